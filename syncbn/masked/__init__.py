"""The training step in plain operators, for what the back ends cannot do: masks, torch.func, forward-mode AD."""
