"""Image bytes to pixel arrays and back, and the certified map from the image that was sent to the model's input."""
