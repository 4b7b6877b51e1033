"""From images with boxes to training samples: numpy and OpenCV in, uint8 tensors out."""
