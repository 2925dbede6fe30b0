"""A figure of its own for a picture, and colours for every kind of eye."""

from typing import TYPE_CHECKING

from nnfwd.errors import BackendError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# M. Okabe and K. Ito, Color Universal Design, 2008; with line styles, so that the curves differ in grey too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LINES = ("-", "--", "-.", ":")
POSITIVE, NEGATIVE = COLOURS[0], COLOURS[1]


def new_axes(width: float, height: float) -> "Axes":
    """The Axes of a new figure, of this size in inches; pyplot's state is not touched.

    Raises `BackendError` where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BackendError("matplotlib is not installed: pip install 'nnfwd[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()
