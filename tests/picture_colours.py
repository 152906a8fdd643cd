"""The colours of the sets of a pair plot, and how much of a picture has one."""

import numpy as np
from PIL import Image

BLUE, ORANGE, GREEN = ((0x1F, 0x5F, 0xA8), (0xD9, 0x66, 0x0F), (0x2F, 0x8A, 0x4B))


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def count(path, colour, off_by=30):
    """Return how many pixels of a picture are near a colour, also where it is half transparent."""
    image, colour = pixels(path).astype(int), np.array(colour)
    # what lies between the colour and white
    shade = np.clip((255 - image) @ (255 - colour) / ((255 - colour) @ (255 - colour)), 0, 1)
    off = np.abs(image - (255 + shade[..., None] * (colour - 255))).max(-1)
    return int(((off < off_by) & (shade > 0.4)).sum())
