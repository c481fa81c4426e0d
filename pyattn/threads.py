"""How many threads the CPU kernels use."""

from __future__ import annotations

from .kernels.cpu import threads as _threads


def set_num_threads(n: int) -> None:
    """Set how many threads a call on NumPy arrays may use.

    It holds for the whole process, from the next call on. Results do not depend on it, to the bit.

    Parameters
    ----------
    n : int, >= 1
        1 runs everything in the calling thread.

    Raises
    ------
    OptionError
        `n` is not a positive integer.

    Notes
    -----
    The default is the environment variable ``PYATTN_NUM_THREADS``, else ``OMP_NUM_THREADS``, else
    ``NUMBA_NUM_THREADS``, else the number of CPUs that this process may run on. Layers and the
    `array_api` backend multiply matrices with NumPy's BLAS, which has its own setting.

    Examples
    --------
    >>> import pyattn
    >>> before = pyattn.get_num_threads()
    >>> pyattn.set_num_threads(1)
    >>> pyattn.get_num_threads()
    1
    >>> pyattn.set_num_threads(before)
    """
    _threads.set_count(n)


def get_num_threads() -> int:
    """Return how many threads a call on NumPy arrays may use.

    Returns
    -------
    int

    See Also
    --------
    set_num_threads : its notes tell the default.

    Examples
    --------
    >>> import pyattn
    >>> pyattn.get_num_threads() >= 1
    True
    """
    return _threads.get_count()
