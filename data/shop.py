"""Blue Kettle, a small shop that does not exist: what it promises, how its customers ask, what it answers.

`make.py` makes support.jsonl and ratings.jsonl of it. Each policy has one figure, which a good answer names.
"""

import random
from typing import NamedTuple


class Policy(NamedTuple):
    "What the shop promises in one matter."

    topic: str
    fact: str  # the sentence that a good answer has
    figure: str  # of that sentence; no other policy has the same
    asked: list[str]  # ways to ask; the last two are kept for the test


POLICIES = [
    Policy(
        "return",
        "You can send it back within 30 days.",
        "30 days",
        [
            "Can I send the {thing} back?",
            "How long can I send the {thing} back?",
            "I do not like the {thing}. Can I send it back?",
            "I want to send the {thing} back.",
            "Do you take the {thing} back?",
            "The {thing} is too big. Do you take it back?",
            "I changed my mind about the {thing}. Can I send it back?",
            "Is it too late to send the {thing} back?",
        ],
    ),
    Policy(
        "express",
        "Express costs 12 euros.",
        "12 euros",
        [
            "Can I get the {thing} by express?",
            "What does express cost for the {thing}?",
            "I need the {thing} tomorrow. Is there express?",
            "How much is express for one {thing}?",
            "Do you send the {thing} by express?",
            "Is express possible for a {thing}?",
            "Please send the {thing} by express. What do I pay?",
            "What is the price of express for the {thing}?",
        ],
    ),
    Policy(
        "broken",
        "Send us a photo within 7 days.",
        "7 days",
        [
            "The {thing} is broken. What do I do?",
            "My {thing} arrived broken.",
            "The {thing} was broken when I opened the parcel.",
            "I opened the parcel, and the {thing} is broken.",
            "There is a broken {thing} in my parcel.",
            "You sent me a broken {thing}.",
            "One {thing} is broken. Can you help me?",
            "What shall I do with a broken {thing}?",
        ],
    ),
    Policy(
        "guarantee",
        "The guarantee is 2 years.",
        "2 years",
        [
            "Is there a guarantee on the {thing}?",
            "How long is the guarantee on the {thing}?",
            "Does the {thing} have a guarantee?",
            "What about the guarantee of my {thing}?",
            "For how long do I have a guarantee on the {thing}?",
            "Which guarantee comes with the {thing}?",
            "My {thing} stopped working. Do I have a guarantee?",
            "Is the guarantee of the {thing} over?",
        ],
    ),
    Policy(
        "voucher",
        "A voucher is good for 3 years.",
        "3 years",
        [
            "Can I pay for the {thing} with an old voucher?",
            "How long is a voucher for a {thing} good?",
            "I got a voucher for a {thing}. When does it end?",
            "Is my voucher for a {thing} still good?",
            "When do I have to use the voucher for a {thing}?",
            "I have an old voucher and want a {thing}.",
            "Until when can I use my voucher for the {thing}?",
            "I found a voucher for a {thing}. Is it too old?",
        ],
    ),
    Policy(
        "phone",
        "We are on the phone from 8 to 4.",
        "8 to 4",
        [
            "Can I call you about the {thing}?",
            "When is somebody on the phone who knows the {thing}?",
            "I want to talk about the {thing} on the phone.",
            "When can I call you about my {thing}?",
            "Is there a phone for questions about the {thing}?",
            "I would like to call you. It is about a {thing}.",
            "At what time can I call somebody about my {thing}?",
            "I have a question about the {thing}. When are you on the phone?",
        ],
    ),
]
HELD_OUT = 2  # wordings of each policy that only the test has
THINGS = "kettle teapot cup bowl lamp clock pan jug tray vase".split()
OPENINGS = ["Hello.", "Hi,", "Good morning.", "Please help me.", "", ""]
DETAILS = ["I bought it last week.", "It was a present.", "It is for my mother.", "I live far away.", "", "", ""]
CLOSINGS = ["Thank you!", "Thanks a lot!", "Bye!", "", "", ""]
THANKS = "Thank you for asking."


def ask(policy: Policy, wording: int, thing: str, rng: random.Random) -> str:
    "A customer's message about a thing in one of the policy's wordings."
    parts = [rng.choice(OPENINGS), policy.asked[wording].format(thing=thing), rng.choice(DETAILS), rng.choice(CLOSINGS)]
    return " ".join(part for part in parts if part)


def answer(policy: Policy) -> str:
    "What the shop replies."
    return f"{THANKS} {policy.fact}"


def pattern(policy: Policy) -> str:
    "What a good answer matches: it names the figure."
    return rf"\b{policy.figure}\b"


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def supported(rng: random.Random) -> list[dict]:
    "300 conversations: 240 to train on, 60 in wordings that the training rows do not have."
    rows = []
    for policy in POLICIES:
        wordings = range(len(policy.asked))
        for split, ones, n in (("train", wordings[:-HELD_OUT], 40), ("test", wordings[-HELD_OUT:], 10)):
            for wording, thing in rng.sample([(w, thing) for w in ones for thing in THINGS], n):
                turns = [message("user", ask(policy, wording, thing, rng)), message("assistant", answer(policy))]
                rows.append({"messages": turns, "topic": policy.topic, "regex": pattern(policy), "split": split})
    rng.shuffle(rows)
    return rows


# ---- replies, good and bad, as two raters see them

IN_WORDS = {
    "30 days": "thirty days",
    "12 euros": "twelve euros",
    "7 days": "seven days",
    "2 years": "two years",
    "3 years": "three years",
    "8 to 4": "eight to four",
}
WRONG = {  # a figure that nobody was promised
    "30 days": "14 days",
    "12 euros": "15 euros",
    "7 days": "2 days",
    "2 years": "1 year",
    "3 years": "5 years",
    "8 to 4": "9 to 6",
}


def other(policy: Policy) -> Policy:
    "Another policy, always the same one."
    return POLICIES[(POLICIES.index(policy) + 2) % len(POLICIES)]


def wrongly(policy: Policy) -> str:
    return policy.fact.replace(policy.figure, WRONG[policy.figure])


def at_length(fact: str) -> str:
    "The same in many words."
    return (
        "Hello, and thank you for your patience. I have looked it up for you, and it is good news: "
        f"{fact[0].lower()}{fact[1:]} If anything else is unclear, just write again. Kind regards"
    )


KINDS = {  # kind: (how many, the reply, does it name the right figure alone?, is it friendly, and nothing in it wrong?)
    "right": (9, lambda p: f"{THANKS} {p.fact}", True, True),
    "in words": (5, lambda p: f"Hello! {p.fact.replace(p.figure, IN_WORDS[p.figure])} Kind regards", True, True),
    "long": (
        3,
        lambda p: at_length(p.fact),
        True,
        True,
    ),
    "curt": (2, lambda p: f"{p.figure}.", True, False),
    "rude": (3, lambda p: f"{p.fact} It says so on our page, so please read before you write.", True, False),
    "vague": (2, lambda p: f"{THANKS} A colleague will look into it and write to you soon.", False, True),
    "wrong": (7, lambda p: f"{THANKS} {wrongly(p)}", False, False),
    "wrong and long": (
        3,
        lambda p: at_length(wrongly(p)),
        False,
        False,
    ),
    "both": (2, lambda p: f"{THANKS} {p.fact} Or is it {WRONG[p.figure]}? I am not sure.", False, False),
    "off the point": (4, lambda p: f"{THANKS} {other(p).fact}", False, False),
}


def rated(rng: random.Random) -> list[dict]:
    "40 replies of every kind, each with what the two raters say of it."
    kinds = [(kind, *rest) for kind, (n, *rest) in KINDS.items() for _ in range(n)]
    rows = []
    for i, (kind, reply, facts, service) in enumerate(kinds):
        policy = POLICIES[i % len(POLICIES)]
        question = policy.asked[i // 6].format(thing=rng.choice(THINGS))
        rows.append(
            {
                "question": question,
                "reply": reply(policy),
                "answer": answer(policy),
                "rubric": f"It says: {policy.fact} It names no other figure, and it is friendly.",
                "regex": pattern(policy),
                "facts": facts,
                "service": service,
                "kind": kind,
            }
        )
    rng.shuffle(rows)
    return rows
