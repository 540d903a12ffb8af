def is_usable(x, entry):
    return False
