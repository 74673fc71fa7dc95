"""Compiles csrc/cuda/ for the CPU before the tests, which otherwise do it themselves."""

from tests.cuda_on_cpu import build

if __name__ == "__main__":
    build()
