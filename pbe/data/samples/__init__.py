"""Training samples: crops, augmentation and masks."""
