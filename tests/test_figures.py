"""The drawings: nothing is written over anything else or outside the canvas, whatever is drawn."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from llmcourse import figures
from llmcourse.core import CHAPTERS, UserError
from llmcourse.figures import group_advantage, ladder, mask_strip, pipeline


def texts(fig) -> list:
    return [t for ax in fig.axes for t in ax.texts if t.get_text().strip()]


def assert_tidy(fig):
    "No text covers another or leaves the canvas; all of it is large enough to read, and 700 pixels wide."
    renderer = FigureCanvasAgg(fig).get_renderer()
    assert fig.get_figwidth() * fig.dpi == pytest.approx(700)
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts(fig)]
    for text, b in boxes:
        assert b.x0 >= 0 and b.y0 >= 0 and b.x1 <= fig.bbox.x1 and b.y1 <= fig.bbox.y1, (
            f"{text!r} leaves the canvas: {b}"
        )
    for (s, a), (t, b) in itertools.combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide < 1 or high < 1, f"{s!r} covers {t!r} by {wide:.1f} × {high:.1f} pixels"
    assert all(t.get_fontsize() >= 8 for t in texts(fig))


def luminance(color) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("here", [None, *figures.STOPS])
def test_pipeline(here):
    fig = pipeline(here)
    assert_tidy(fig)
    said = [t.get_text() for t in texts(fig)]
    assert set(figures.STOPS) <= set(said)
    assert [t.get_text() for t in texts(fig) if t.get_weight() == "bold" and t.get_text() in figures.STOPS] == [here][
        : here is not None
    ]
    for name, (number, *_) in figures.STOPS.items():
        color = next(t for t in texts(fig) if t.get_text() == name).get_color()
        assert (color == figures.FAINT) == (number not in CHAPTERS), (
            f"{name} is drawn as if it were {'' if number in CHAPTERS else 'not '}missing"
        )


def test_every_chapter_has_a_stop():
    drawn = {number for number, *_ in figures.STOPS.values()}
    assert {n[:2] for n in CHAPTERS if n not in ("03",) and n <= "11"} <= drawn  # 09b is part of 09


def test_pipeline_suggests():
    with pytest.raises(UserError, match="did you mean 'lora'"):
        pipeline("loar")


def test_text_is_readable():
    "Contrast of at least 4.5 to the ground that it is written on (WCAG 2, AA)."
    pairs = [
        (figures.INK, "white"),
        (figures.FAINT, "white"),
        (figures.UP, "white"),
        (figures.DOWN, "white"),
        (figures.INK, figures.TRAINED),
        ("#5c5c5c", figures.MASKED),
    ]
    pairs += [("white", c) for c in figures.DEEP.values()] + [(figures.INK, c) for c in figures.TINT.values()]
    for ink, ground in pairs:
        light, dark = sorted([luminance(ink), luminance(ground)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


PIECES = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "user",
    "<|end_header_id|>",
    "\n\n",
    "What",
    " costs",
    " $",
    "5",
    " or",
    " $",
    "6",
    "?",
    "\t",
    "",
    "x" * 90,
    "\x00",
    "<|eot_id|>",
]


@pytest.mark.parametrize("n", [1, 2, len(PIECES), 300])
@pytest.mark.parametrize("title", [None, "A title with $5 and $6"])
def test_mask_strip(n, title):
    pieces = (PIECES * 20)[:n]
    fig = mask_strip(pieces, [i % 3 == 0 for i in range(n)], title)
    assert_tidy(fig)
    said = [t.get_text() for t in texts(fig)]
    assert said[0 if title is None else 1] == "<|begin_of_text|>"
    assert f"trained: {(n + 2) // 3} of {n} tokens" in said
    if n > 5:
        assert "↵↵" in said and "<|eot_id|>" in said


def test_mask_strip_tokens_stay_in_their_boxes():
    fig = mask_strip(["W" * k for k in range(1, 41)], [True] * 40)
    renderer = FigureCanvasAgg(fig).get_renderer()
    for patch, text in zip(fig.axes[0].patches[:40], texts(fig)):
        ground, written = patch.get_window_extent(renderer), text.get_window_extent(renderer)
        assert ground.x0 <= written.x0 + 0.5 and written.x1 <= ground.x1 + 0.5, text.get_text()


def test_mask_strip_takes_an_xray():
    from llmcourse.xray import xray
    from llmcourse.models import load_tokenizer

    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "2+2: 4.\nAnswer: 4"}]
    picture = xray(load_tokenizer("tutor/sft"), chat)
    fig = mask_strip(picture)
    assert_tidy(fig)
    assert f"trained: {picture.counts['trained']} of {picture.counts['tokens']} tokens" in [
        t.get_text() for t in texts(fig)
    ]


@pytest.mark.parametrize("pieces,trained", [([], []), (["a"], [True, False])])
def test_mask_strip_refuses(pieces, trained):
    with pytest.raises(UserError):
        mask_strip(pieces, trained)


REPLIES = ["47+38: ones 7+8=15, carry 1, tens 4+3+1=8, so 85.\nAnswer: 85", "$5 or $6", "", "W" * 200]


@pytest.mark.parametrize(
    "rewards,advantages",
    [
        ([1], [0]),
        ([0, 1], [-0.7071, 0.7071]),
        ([1, 1, 1, 1], [0] * 4),
        ([0] * 8, [0] * 8),
        ([-1234.5, 20000, 0, 0.3333333], [-1e4, 1e4, 0, 0.001]),
        ([1, 0] * 8, [0.97, -0.97] * 8),
    ],
    ids=["one", "two", "silent", "silent-zero", "wild", "sixteen"],
)
def test_group_advantage(rewards, advantages):
    fig = group_advantage((REPLIES * 4)[: len(rewards)], rewards, advantages)
    assert_tidy(fig)
    said = [t.get_text() for t in texts(fig)]
    assert said.count("▲ more likely") == sum(a > 0 for a in advantages)
    assert said.count("▼ less likely") == sum(a < 0 for a in advantages)
    assert any("silent group" in t for t in said) == (not any(advantages))


def test_group_advantage_takes_tensors():
    import torch

    assert_tidy(group_advantage(["a", "b"], torch.tensor([0.0, 1.0]), torch.tensor([-0.7, 0.7])))


@pytest.mark.parametrize(
    "group", [([], [], []), (["a"], [1, 2], [0]), (["a"] * 17, [1] * 17, [0] * 17), (["a"], [float("nan")], [0])]
)
def test_group_advantage_refuses(group):
    with pytest.raises(UserError):
        group_advantage(*group)


@pytest.mark.parametrize("n", [1, 4, 12])
def test_ladder(n):
    rungs = [{"rung": "… as GGUF Q4_K_M, served", "accuracy": 1.0, "low": 0.9, "high": 1.0, "n": 12345}] * n
    for title in (None, "From base model to chat"):
        assert_tidy(ladder(rungs, title))
    with pytest.raises(UserError):
        ladder([])


def test_the_readme_picture_is_of_a_recorded_run():
    from pathlib import Path

    from llmcourse.core import read_jsonl

    images = Path(__file__).parent.parent / "nbs/images"
    rungs = read_jsonl(images / "ladder.jsonl")
    assert len(rungs) == 4 and all(r["low"] <= r["accuracy"] <= r["high"] for r in rungs)
    assert (images / "ladder.png").read_bytes()[:4] == b"\x89PNG"
