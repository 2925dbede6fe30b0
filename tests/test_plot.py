"""Pictures are checked for what they show, not for pixels."""

import numpy as np
import pytest
from networks import ensemble, tutorial

from nnfwd.demo import digits
from nnfwd.errors import ShapeError

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'nnfwd[plot]'")

from matplotlib.patches import Circle

from nnfwd import plot


def texts(ax):
    return [text.get_text() for text in ax.texts]


def edges(ax):
    return [(c, width) for c in ax.collections for width in c.get_linewidths()]


def test_the_tutorials_network_with_its_numbers():
    net, x = tutorial()
    ax = plot.network(net, x)
    assert len([p for p in ax.patches if isinstance(p, Circle)]) == 7
    assert len(edges(ax)) == 9 + 3
    shown = texts(ax)
    for number in ("1.5", "2", "3", "0.8909", "0.9677", "0.9910", "0.83545566"):
        assert number in shown
    assert [shown.count(weight) for weight in ("0.2", "0.4", "0.6", "0.5")] == [3, 3, 3, 3]
    assert shown.count("b = 0.8") == 3
    assert shown.count("b = 0.2") == 1
    assert {"input", "hidden 1\nsigmoid", "output\nsigmoid"} <= set(shown)
    widths = sorted({round(width, 6) for _, width in edges(ax)})
    assert len(widths) == 3  # 0.2, 0.4, and the largest of each layer


def test_wide_layers_leave_their_middle_out_and_say_so():
    net, images, _ = digits()
    ax = plot.network(net[1:], images[0] / 16)
    assert "52 more" in texts(ax)
    assert "20 more" in texts(ax)
    colours = {tuple(np.round(c.get_colors()[0][:3], 2)) for c in ax.collections}
    assert len(colours) == 2


def test_draws_nothing_global_and_on_the_axes_given():
    from matplotlib import _pylab_helpers
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert plot.network(tutorial()[0], ax=axes) is axes
    assert not _pylab_helpers.Gcf.figs


def test_what_cannot_be_drawn():
    with pytest.raises(ShapeError, match="single network"):
        plot.network(ensemble())
    with pytest.raises(ShapeError, match=r"\(2, 3\) is not one input"):
        plot.network(tutorial()[0], np.ones((2, 3)))
