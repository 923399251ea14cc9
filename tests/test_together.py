"""The tests of a file share what they build, so side by side they must run in one process, one after the other."""
import pytest

SEEN = []


@pytest.mark.parametrize("number", range(8))
def test_one_process(number, request):
    before = [i for i in request.session.items if i.path == request.path].index(request.node)
    assert len(SEEN) == before, "the tests of this file were split between two processes"
    SEEN.append(number)
