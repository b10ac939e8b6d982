"""What the tests of cards have their processes call."""

import os
import signal
import threading
import time

import torch

from athena_gguf.errors import AthenaError
from athena_gguf.model.trust import runs_code


class Odd(Exception):
    """Cannot be sent: it is made from two things and pickled as one."""

    def __init__(self, one, two):
        super().__init__(one)


def add(here, *tensors, more=0):
    return sum(tensors) + more


def raises(here, kind):
    if kind == "odd":
        raise Odd("this", "that")
    kinds = {"athena": AthenaError, "memory": torch.OutOfMemoryError, "key": KeyError, "end": SystemExit}
    raise kinds[kind]("too odd")


def refuse(here, ones):
    here.share = True
    raise RuntimeError("peer access is not supported\nbetween these devices")


def misread(here, ones):
    here.share = True
    return ones


def shares(here):
    return here.share


def code(here):
    return runs_code()


def sleep(here, seconds):
    time.sleep(seconds)
    return os.getpid()


_MET = threading.Barrier(4)


def meet(here):
    """Returns once four calls are here at the same time."""
    _MET.wait(120)
    return os.getpid()


def die(here):
    os.kill(os.getpid(), signal.SIGKILL)
