"""Wrappers of optimizers as trainers make them, without the trainers."""


class CopyingWrapper:
    """As Lightning Fabric's: a subclass of the optimizer's class with a copy of its ``__dict__``."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step")}
        self.__class__ = type("Wrapped", (self.__class__, optimizer.__class__), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(**({} if closure is None else {"closure": closure}))


class ForwardingWrapper:
    """As Lightning's: it has nothing but looks everything up; its ``step()`` passes a closure that does nothing."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (self.__class__, optimizer.__class__), {})

    def step(self, closure=None):
        return self._optimizer.step(closure or (lambda: None))

    def __getattr__(self, name):
        return getattr(self._optimizer, name)
