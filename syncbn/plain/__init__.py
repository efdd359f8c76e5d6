"""Training steps in plain operators, for what the back ends cannot do: masks, torch.func, other norms."""
