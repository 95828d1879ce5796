from dnas.supernet import Candidate, Macro, Stage


def toy(*, num_classes: int = 4, in_chans: int = 3, img_size: int = 8, width_mult: float = 1.0, divisor: int = 8) -> Macro:
    cands = (Candidate("ir", 3, 4, 4), Candidate("ir", 5, 4, 4))
    return Macro("toy", 8, 1, (Stage(32, 3, 1, cands, droppable=True),), 32, "relu", True, num_classes, in_chans, img_size, divisor)
