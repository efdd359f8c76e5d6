"""What `launch/` runs: data, nets, the task and the report of one experiment. Nothing in syncbn imports it."""
