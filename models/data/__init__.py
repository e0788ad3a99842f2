"""Data sets: published ones with their checksums, folders of images, and random changes of training images."""
