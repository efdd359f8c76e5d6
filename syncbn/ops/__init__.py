"""One training step: four phases for each kind of device, and one autograd Function around them."""
