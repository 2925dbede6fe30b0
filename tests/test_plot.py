"""Pictures are checked for what they show, not for pixels."""

import numpy as np
import pytest
from networks import ensemble, tutorial

from nnfwd import Dense
from nnfwd.bounds import Arithmetic, looped_bound
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


def curve(ax, i=0):
    return ax.get_lines()[i].get_xydata()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


GRID = np.arange(-80, 81) / 10


def is_node(ax, i, w, b):
    """A curve is sigmoid(w x + b) on the tutorial's grid, inside the bound."""
    x, y = curve(ax, i).T
    bounded = looped_bound(GRID[:, None], [Dense([[w]], [b], "sigmoid")], arithmetic=Arithmetic("float64"))
    return np.array_equal(x, GRID) and bounded.ratio(y[:, None]).max() <= 1


def test_the_sigmoid():
    ax = plot.activation()
    assert is_node(ax, 0, 1.0, 0.0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "f(x)")
    assert len(GRID) == 161
    assert curve(plot.activation("relu"))[-1, 1] == 8


def test_what_a_weight_does():
    ax = plot.weight_effect()
    for i, w in enumerate((0.5, 1, 2)):
        assert is_node(ax, i, w, 0.0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["w = 0.5", "w = 1", "w = 2"]
    assert ax.get_legend()._loc == 2  # upper left
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "h_w(x)")
    assert curve(plot.weight_effect([3.0], activation="relu"))[-1, 1] == 24


def test_what_a_bias_does():
    ax = plot.bias_effect()
    for i, b in enumerate((-8, 0, 8)):
        assert is_node(ax, i, 5.0, b)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b = -8", "b = 0", "b = 8"]
    assert ax.get_legend()._loc == 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "h_wb(x)")
    assert curve(plot.bias_effect([1.0], weight=2.0, activation="relu"))[-1, 1] == 17


def test_the_curves_differ_without_colour():
    styles = [line.get_linestyle() for line in plot.weight_effect().get_lines()]
    assert len(set(styles)) == 3


def test_the_gallery_shows_every_activation_and_its_derivative():
    from nnfwd import activations
    from nnfwd.plot.curves import RANGES

    assert sorted(name for names in RANGES.values() for name in names) == sorted(activations.names())
    small = {child.get_title().partition("(")[0]: child for child in plot.activations().child_axes}
    assert set(small) == set(activations.names())
    for name, ax in small.items():
        slope, values = (line.get_ydata() for line in ax.get_lines()[:2])
        steps = np.diff(values) / np.diff(GRID)
        inside = [i for i in range(160) if np.isfinite(slope[i : i + 2]).all()]
        low, high = np.minimum(slope[:-1], slope[1:]), np.maximum(slope[:-1], slope[1:])
        wide = 0.15 + 0.15 * np.abs(steps)  # a curve's mean slope lies near those at both ends; a kink may be between
        assert all(low[i] - wide[i] <= steps[i] <= high[i] + wide[i] for i in inside), name
    by_range = {name: title for title, names in RANGES.items() for name in names}
    for name, ax in small.items():
        values = ax.get_lines()[1].get_ydata()
        bounds = {"from 0 to 1": (0, 1), "from -1 to 1": (-1, 1), "from 0 upwards": (0, np.inf)}.get(by_range[name])
        if bounds:
            assert values.min() >= bounds[0], name
            assert values.max() <= bounds[1], name


def test_a_node_with_its_numbers():
    ax = plot.node([1.5, 2, 3], [0.2, -0.4, 0.2], 0.8)
    shown = texts(ax)
    z = 0.2 * 1.5 - 0.4 * 2 + 0.2 * 3 + 0.8
    for text in (
        "1.5",
        "2",
        "3",
        "1",
        "w = 0.2",
        "w = -0.4",
        "b = 0.8",
        "Σ",
        "sigmoid",
        f"z = {z:.8g}",
        f"h = {sigmoid(z):.8g}",
    ):
        assert text in shown
    widths = [line.get_linewidth() for line in ax.get_lines()]
    assert widths[3] > widths[1] > widths[0] == widths[2]  # 0.8, 0.4, 0.2
    assert len({line.get_color() for line in ax.get_lines()}) == 2
    with pytest.raises(ShapeError, match=r"\(1, 2\) cannot take x \(3,\)"):
        plot.node([1, 2, 3], [1, 2])


@pytest.mark.parametrize("draw", [plot.activation, plot.activations, plot.weight_effect, plot.bias_effect])
def test_every_picture_takes_axes(draw):
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert draw(ax=ax) is ax
