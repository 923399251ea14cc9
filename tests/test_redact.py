"""What leaves a conversation before it is kept, and what stays."""

import json
import time
from pathlib import Path

import pytest

from llmcourse.redact import Mask, luhn, redact, secret
from llmcourse.tutor import problems

ROOT = Path(__file__).parent.parent
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7x\nq2Zk\n-----END RSA PRIVATE KEY-----"
PERSONAL = [
    # e-mail addresses
    ("EMAIL", "ana@school.org"),
    ("EMAIL", "Jo.Smith+maths@mail.school.co.uk"),
    ("EMAIL", "müller@schule.de"),
    ("EMAIL", "x_1@a-b.io"),
    # telephone numbers
    ("PHONE", "+49 171 2345678"),
    ("PHONE", "+49 (0)171 234 56 78"),
    ("PHONE", "+44 20 7946 0958"),
    ("PHONE", "+1 (415) 555-2671"),
    ("PHONE", "+14155552671"),
    ("PHONE", "+33 6 12 34 56 78"),
    ("PHONE", "+34 612 345 678"),
    ("PHONE", "0049 171 2345678"),
    ("PHONE", "(415) 555-2671"),
    ("PHONE", "415-555-2671"),
    ("PHONE", "415.555.2671"),
    ("PHONE", "1-415-555-2671"),
    ("PHONE", "0171 2345678"),
    ("PHONE", "0171/2345678"),
    ("PHONE", "030-12345678"),
    ("PHONE", "06 12 34 56 78"),
    ("PHONE", "020 7946 0958"),
    ("PHONE", "01712345678"),
    # cards
    ("CARD", "4242 4242 4242 4242"),
    ("CARD", "4242424242424242"),
    ("CARD", "5555-5555-5555-4444"),
    ("CARD", "378282246310005"),
    ("CARD", "3782 822463 10005"),
    ("CARD", "6011111111111117"),
    # accounts
    ("IBAN", "DE89 3704 0044 0532 0130 00"),
    ("IBAN", "DE89370400440532013000"),
    ("IBAN", "GB29 NWBK 6016 1331 9268 19"),
    ("IBAN", "FR14 2004 1010 0505 0001 3M02 606"),
    ("IBAN", "NO93 8601 1117 947"),
    # internet addresses
    ("IP", "84.12.7.9"),
    ("IP", "192.168.178.23"),
    ("IP", "2a02:8108:50bf:9d44:1c2d:3e4f:5a6b:7c8d"),
    ("IP", "2a02:8108:50bf::7c8d"),
]
KEYS = [
    "sk-proj-" + "Ab1_" * 12,
    "sk-ant-api03-" + "Zx9-" * 10,
    "gsk_" + "a1B2" * 12,
    "hf_" + "aB1" * 12,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2_" * 14,
    "glpat-" + "a1B2-" * 5,
    "npm_" + "a1B2" * 9,
    "AKIA" + "Q7" * 8,
    "AIza" + "Sy1_-" * 7,
    "xoxb-1234567890-abcdefghij",
    "sk_live_" + "a1B2" * 5,
    JWT,
    PEM,
]
PASSWORDS = [
    ("password={}", "tulip2024"),
    ("Password: {}", "tulip-2024!"),
    ("my password is {}", "tulip2024"),
    ('"password": "{}"', "tulip2024"),
    ('{{"arguments": "{{\\"password\\": \\"{}\\"}}"}}', "tulip2024"),
    ("DB_PASSWORD='{}'", "correcthorse"),
    ("pwd: {}", "123456"),
    ("aws_secret_access_key = {}", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzzzz1"),
    ("client_secret={}", "a8f7-99x1"),
    ("api_key: {}", "d41d8cd98f00b204"),
    ("x-api-key: {}", "d41d8cd98f00b204"),
    ("access_token={}", "ya29.a0AfH6SMB1"),
    ("Authorization: Bearer {}", "d41d8cd98f00b204e980"),
    ("curl -H 'Authorization: bearer {}'", "abc123.def-456_ghi"),
    ("postgresql://me:{}@db.host/chat", "tulip"),
]
WORD = ("call me at {}", "My phone number is {}.", "tel. {}", "WhatsApp: {}")
INNOCENT = """What is 500-250-1000?
415-555-2671 = ?
2 + 415-555-2671
4242424242424242 + 1 = ?
1,234,567.89 dollars
10 000 000 000 people
+10 000 000 000
The year 2024, and 1990-2000
2024-11-29T17:09:44Z, 29.11.2024, 11/29/2024, 06-12-2024 18:30, 01 02 2024 1030
08:15:30 to 12:30:45
3.14159265358979 and -2.718281828459045
+1.2345678901
1e-05, 6.02214076e+23, 0.000123456
0101 1010 0110 and 00000000
0123456789
ISBN 0306406152, ISBN 978-3-16-148410-0
123e4567-e89b-12d3-a456-426614174000
version 10.0.1.2, v1.12.3.4, section 4.1.2.3, 127.0.0.1, 0.0.0.0, 8.8.8.8
200 300 4000 5000
200-300
4242 4242 4242 4243
7777 7777 7777 7777
The order 4111 1111 1111 1112
sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
x[::2], std::vector<int>, a::b::c, 12:30:45:50
q@k.transpose(0, 1), a @ b, 12 @ 3 each, git@github.com:me/it
user@example.com
What is a password? Password: required. The secret: practise every day.
password: 12-character minimum. The password is 8-16 characters.
max_tokens=100000000, tokens: they are words. secret = input()
{"password": {"type": "string"}, "required": ["password", "token"]}
skip-level meeting of the risk-averse task-force-leader-group
the bearer of extraordinarily-good-news
https://llmcourse.org/a:b/c@d and http://127.0.0.1:8080/v1
The phone costs 1200 dollars, and 1 000 000 phones were sold. Call 3 friends.
0.25 * 1000, 1/3, 12345678, 1234567890, 12345678901234
GB12 is a road. AB12 CDEF GHIJ KLMN are letters.
$1,000 or #### 1000, 50 %, 007""".splitlines()


def hidden(text):
    return redact(text)[0]


@pytest.mark.parametrize("mark,value", PERSONAL, ids=[value for _, value in PERSONAL])
def test_what_belongs_to_somebody_is_hidden(mark, value):
    for frame in ("{}", "Hello, I am {}.", "({})", "a: {}, b", "It is\n{}\nthere", '{{"contact": "{}"}}'):
        assert hidden(frame.format(value)) == frame.format(f"[{mark}_1]")


@pytest.mark.parametrize("key", KEYS, ids=[key[:12] for key in KEYS])
def test_keys_are_hidden_whole(key):
    for frame in ("{}", "My key is {}", "KEY={}\nnext", '{{"key": "{}"}}'):
        assert hidden(frame.format(key)) == frame.format("[KEY_1]")
    what, sure = secret(f"here {key}")
    assert what and sure and key not in what


@pytest.mark.parametrize("frame,value", PASSWORDS, ids=[frame for frame, _ in PASSWORDS])
def test_passwords_are_hidden_and_the_word_before_them_stays(frame, value):
    assert hidden(frame.format(value)) == frame.format("[PASSWORD_1]")
    assert value not in secret(frame.format(value))[0]


@pytest.mark.parametrize("frame", WORD)
@pytest.mark.parametrize("number", ["5552671", "555-2671", "415 555 2671", "(415) 555 2671", "4155552671"])
def test_a_word_makes_a_number_a_telephone_number(frame, number):
    assert hidden(frame.format(number)) == frame.format("[PHONE_1]")


@pytest.mark.parametrize("text", INNOCENT)
def test_innocent_texts_stay(text):
    assert redact(text) == (text, {})


def test_every_problem_of_the_tutor_stays():
    for seed in (0, 1, 2):
        rows = problems(500, seed)
        assert len(rows) >= 1000 and redact(rows) == (rows, {})


# what the sample files hold on purpose: file → (marks, how often)
PLANTED = {"sick.jsonl": {"KEY": 9, "PASSWORD": 1, "EMAIL": 1}}


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.jsonl")), ids=lambda p: p.name)
def test_the_sample_files_stay(path):
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    counts = redact(lines)[1]
    assert counts == PLANTED.get(path.name, {})


def test_one_value_one_placeholder():
    asks = {"role": "user", "content": "ana@school.org or bo@school.org, 0171 2345678"}
    says = {"role": "assistant", "content": "Bo is BO@school.org, at 0171-2345678"}
    row = {"messages": [asks, says], "n": 3}
    made, counts = redact(row)
    assert made["messages"][0]["content"] == "[EMAIL_1] or [EMAIL_2], [PHONE_1]"
    assert made["messages"][1]["content"] == "Bo is [EMAIL_2], at [PHONE_1]"
    assert counts == {"EMAIL": 3, "PHONE": 2} and made["n"] == 3 and row["messages"][0]["content"].startswith("ana@")


def test_what_is_masked_stays_masked():
    once = hidden("I am ana@school.org, password: tulip2024, token=[KEY_1]")
    assert redact(once) == (once, {})
    assert hidden("[EMAIL_3] wrote to ana@school.org") == "[EMAIL_3] wrote to [EMAIL_4]"


def test_a_conversation_that_goes_on_keeps_its_placeholders():
    turns = ["I am ana@school.org", "Hello ana@school.org", "Copy bo@school.org, call 0171 2345678"]
    assert hidden(turns[:2]) == hidden(turns)[:2]


def test_counts_go_on():
    mask = Mask()
    mask(["ana@school.org"])
    mask({"a": "ana@school.org", "b": None, "c": 4242424242424242})
    assert mask.counts == {"EMAIL": 2} and luhn("4242424242424242")


def test_it_is_linear_in_the_text():
    "A hundred kilobytes of what a pattern might try again from each letter."
    pieces = "a.|0 |1-|AB12 |sk|password |a:|1:|+1|eyJ|a@|-----BEGIN PRIVATE KEY|://a:|token=|call me "
    for piece in pieces.split("|"):
        text = json.dumps([piece * (100_000 // len(piece)) + " password: @ :// bearer key 1"])
        start = time.process_time()
        redact(text)
        assert time.process_time() - start < 20, piece
