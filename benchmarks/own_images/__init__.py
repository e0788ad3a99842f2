"""The trial of a user with own images: `lipcert train FOLDER` beside an ordinary small network on the same pixels.

`python -m benchmarks.own_images.sets` makes folders of images, `python -m benchmarks.own_images` measures them and
writes `benchmarks/OWN_IMAGES.md`, see `__main__`.

Axes: N images, C channels, H height, W width, K classes.
"""
