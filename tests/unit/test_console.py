"""The line of numbers that a person reads."""

import pytest

from megatron_cogview.training.console import console_line, count, duration

NAN = float("nan")
WHOLE = {
    "loss": 4.3211,
    "text_loss": 5.67,
    "image_loss": 4.12,
    "grad_norm": 0.8311,
    "lr": 3e-4,
    "loss_scale": 65536.0,
    "bad_steps": 0.0,
    "seconds_per_step": 12.3,
    "tokens_per_second": 25_412.0,
    "mfu": 0.6121,
    "memory_gib": 71.31,
    "eta_seconds": 273_700.0,
}


def test_everything_on_one_line():
    assert console_line(1200, 144_000, WHOLE) == (
        "step   1,200/144,000  loss 4.321 (text 5.670, image 4.120)  grad 0.831  scale 65,536  "
        "lr 3.0e-04  25.4k tok/s  MFU 61.2 %  71.3 GiB  ETA 3 d 4 h"
    )


def test_what_is_missing_is_left_out():
    values = {"loss": 1.0, "text_loss": NAN, "image_loss": 1.0, "grad_norm": NAN, "loss_scale": 1.0}
    assert console_line(7, 10, values) == "step  7/10  loss 1.000 (image 1.000)"
    assert console_line(7, 10, {"loss": NAN, "lr": 0.5}) == "step  7/10  lr 5.0e-01"


def test_what_went_wrong_is_seen():
    values = {"loss": float("inf"), "grad_norm": float("inf"), "bad_steps": 3.0}
    assert console_line(1, 2, values) == "step 1/2  loss inf  grad inf  bad steps 3"


def test_validation():
    values = {"validation_loss": 4.5, "validation_text_loss": 5.0, "validation_image_loss": 4.25}
    assert console_line(2, 2, values) == "step 2/2  validation loss 4.500 (text 5.000, image 4.250)"


def test_of_the_layers_the_largest_is_shown_and_where():
    values = {
        "activation_max/layer_01": 3.0,
        "activation_max/layer_02": 812.4,
        "attention_score_max/layer_01": 45.21,
        "attention_score_max/layer_02": 0.5,
    }
    assert console_line(1, 1, values) == (
        "step 1/1  largest |x| 812 (layer 02)  largest score 45.2 (layer 01)"
    )


def test_other_numbers_follow_under_their_names():
    values = {"psnr": 23.456, "codes_in_use": 250.0, "pictures_per_second": 1234.5}
    assert console_line(1, 1, values) == (
        "step 1/1  psnr 23.46  codes in use 250  pictures per second 1234"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (99.9, "99.9"),
        (812.3, "812"),
        (999.6, "1.00k"),
        (9_996, "10.0k"),
        (25_412, "25.4k"),
        (999_400, "999k"),
        (999_900, "1.00M"),
        (1.5e9, "1.50G"),
    ],
)
def test_counts(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0:00:00"),
        (59.6, "0:01:00"),
        (3_725, "1:02:05"),
        (86_399, "23:59:59"),
        (86_399.9, "1 d 0 h"),
        (3 * 86_400 + 4 * 3_600 + 1_700, "3 d 4 h"),
        (2 * 86_400 - 1, "2 d 0 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
