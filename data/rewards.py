"""Two rewards of one's own for `llmcourse reward check data/rewards.py` and `llmcourse grpo --reward data/rewards.py:right`.

TRL calls a reward with the completions and every column of the rows by name, and takes one float a completion.
"""
import re


def said(completion) -> str:
    return completion[-1]["content"]


def right(completions, answer, **columns):
    "1 if the last number of the reply is the answer."
    return [float(re.findall(r"\d+", said(c))[-1:] == [a]) for c, a in zip(completions, answer, strict=True)]


def brief(completions, **columns):
    "More for a shorter reply, whatever it says: chapter 09 lost 67 of 70 stories to a reward like this one."
    return [max(0.0, 1 - len(said(c)) / 250) for c in completions]
