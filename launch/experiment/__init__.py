"""What `launch/` runs."""
