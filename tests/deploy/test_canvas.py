"""Pictures come small, in exactly the theme's colours, in the form asked for."""

import io

import numpy as np
import pytest
from PIL import Image

from deploy.canvas import Form, legend, new_figure, place, png, scale_compression

FORMS = [Form(dark=dark, narrow=narrow) for dark in (False, True) for narrow in (False, True)]


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("form", FORMS)
def test_every_colour_of_the_theme_is_exact_in_a_picture_of_a_palette(form: Form) -> None:
    figure, axes = new_figure(form)
    for index in range(8):
        axes.barh(index, 1.0, color=form.theme.nth(index))
    with Image.open(io.BytesIO(png(figure, form))) as image:
        assert image.mode == "P"
        assert image.size == tuple(round(150 * inches) for inches in form.inches)
        pixels = np.asarray(image.convert("RGB"))
    assert tuple(pixels[0, 0]) == rgb(form.theme.paper)
    for colour in (form.theme.grid, *form.theme.groups.values(), form.theme.other):
        assert (pixels == rgb(colour)).all(axis=2).any(), colour


def test_what_has_no_colour_of_its_own_has_its_neighbours_only_after_all_are_used() -> None:
    theme = Form().theme
    colours = [theme.nth(index) for index in range(9)]
    assert len(set(colours[:8])) == 8
    assert colours[8] == colours[0]
    assert theme.colour("a group of others") == theme.other


def test_compression_is_logarithmic_in_what_is_left_and_no_network_is_nothing() -> None:
    assert [place(compression) for compression in (0.0, 0.9, 0.99, 1.0)] == pytest.approx([0.0, 1.0, 2.0, 4.0])
    _, axes = new_figure(Form())
    scale_compression(axes, 0.6, 1.4, Form())
    labels = [axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks()]
    assert labels == ["80%", "90%", "95%"]


def test_a_picture_without_anything_in_it_says_so() -> None:
    figure, axes = new_figure(Form())
    legend(axes, [], Form())
    assert [text.get_text() for text in axes.texts] == ["nothing yet"]
    assert figure.legends == []
