"""How many images go through a network at once."""

#: Pixel values of a batch, at most: 27 images of 3x224x224, which take some hundred megabytes in a large network.
AT_ONCE = 2**22


def batch_size(values: int, most: int) -> int:
    """``most``, or fewer where images are large.

    :param values: of one image, channels x height x width
    """
    return max(1, min(most, AT_ONCE // max(values, 1)))
