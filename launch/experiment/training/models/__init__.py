"""The models: classifiers and a U-Net, never with pretrained weights."""
