"""Images of a run, a file each, written as they come: a run that goes on draws those that are not there."""

from itertools import groupby

from PIL import Image

from evaluation.constant_images import is_constant, say_constant
from models.drawing import generate_batches
from quant.files import save_png


class Pictures:
    """The images that one model draws of a run's prompts, in a folder of their own."""

    def __init__(self, folder, prompts):
        self.folder, self.prompts = folder, prompts
        self.paths = [folder / f"{index:03d}.png" for index in range(len(prompts))]
        self.broken = []  # paths of images whose values are not numbers

    def missing(self):
        """Numbers of the images that are not there, or damaged."""
        return [index for index, path in enumerate(self.paths) if not is_whole(path)]

    def draw(self, numbers, sampler, settings, name):
        """Draw the images of these numbers and keep each batch as it comes; one that is not made of numbers is `broken`."""
        constant = []
        for first, last in ranges(numbers):
            for batch in generate_batches(sampler, self.prompts, settings, name, first, last):
                constant += list(is_constant(batch.images, batch.broken))
                for index, image, broken in zip(batch.indices, batch.images, batch.broken, strict=True):
                    if broken:
                        self.broken.append(self.paths[index])
                    else:
                        save_png(image, self.paths[index])
        say_constant(name, constant)


def is_whole(path):
    """Whether an image file is there and all of it."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception:  # many types: a PNG file that is cut off is a SyntaxError to its reader
        return False
    return True


def ranges(numbers):
    """(first, behind the last) of each stretch of successive ones of ascending numbers."""
    for _, stretch in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        stretch = [number for _, number in stretch]
        yield stretch[0], stretch[-1] + 1
