"""Numbers in words, with units and in whole sentences; who is right was written by hand before any of it was tried."""

import pytest

from llmcourse.evals import grade_row

# (reply, reference, is it right?)
CASES = [
    ("eighteen", "18", True),
    ("Eighteen.", "18", True),
    ("She has twenty-one marbles left.", "21", True),
    ("The answer is twenty one.", "21", True),
    ("Answer: forty-two", "42", True),
    ("one hundred and five dollars", "105", True),
    ("a hundred and five", "105", True),
    ("two thousand three hundred and six", "2306", True),
    ("three and a half", "3.5", True),
    ("zero", "0", True),
    ("eighteen", "80", False),
    ("eighty", "18", False),
    ("eighteenth", "18", False),
    ("No one knows.", "1", False),
    ("I think the second one is right.", "1", False),
    ("12 boxes at 3 each make 36, which is what one pays.", "36", True),
    ("twenty, one of them broken", "21", False),
    ("First 5, then 8 more, so thirteen.", "13", True),
    ("seventy-two thousand", "72000", True),
    ("minus four", "-4", True),
    ("negative seven degrees", "-7", True),
    ("#### twelve", "12", True),
    (r"\boxed{\text{twelve}}", "12", True),
    ("twelve (12)", "12", True),
    ("Answer: 15, not eighteen", "15", True),
    ("Answer: eighteen or nineteen", "18", False),
    ("two dozen eggs", "24", True),
    ("He is eighteen years old.", "18", True),
    ("**Eighteen** kilometres", "18 km", True),
    ("eighteen miles", "18 km", False),
    ("18 km", "18", True),
    ("Answer: 18 km per hour", "18 km/h", True),
    ("18 m²", "18", True),
    ("50%", "50", True),
    ("50 percent", "50%", True),
    ("fifty percent", "50%", True),
    ("0.5%", "50%", False),
    ("The train leaves at 9 and takes ninety minutes.", "90", True),
    ("18 apples after 3 days", "18", True),
    ("It takes him 18 days to pick 240 apples.", "18", True),
]


@pytest.mark.parametrize("reply, reference, right", CASES)
def test_number_words(reply, reference, right):
    assert grade_row({"answer": reference}, reply) is right
