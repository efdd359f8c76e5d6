"""The only folder that calls torch.distributed: one exchange, which ranks take part in it, what DDP does meanwhile."""
