"""What compiled kernels are given is checked here, once a call: they themselves read and write where they are told."""


def expect(name, array, shape, *dtypes):
    """ValueError unless `array`, torch's or numpy's, has that shape (None: any number), one of the dtypes, and no gaps."""
    found = tuple(array.shape)
    fits = len(found) == len(shape) and all(want is None or want == got for want, got in zip(shape, found, strict=True))
    if not fits or array.dtype not in dtypes:
        raise ValueError(f"{name} is {array.dtype} {list(found)}, not {dtypes[0]} {list(shape)}")
    flags = getattr(array, "flags", None)
    if not (array.is_contiguous() if flags is None else flags.c_contiguous):
        raise ValueError(f"{name} is not contiguous")
