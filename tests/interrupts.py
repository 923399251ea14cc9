"""Interrupt a small `llmcourse flywheel run --data` at some seconds: python tests/interrupts.py 2 4 6 8 10 12 14 16.

Each run has to end with 130 and its one line. What is live by then stays so, before that nothing is left behind."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)   # also where the caller ignores it
from llmcourse.cli import cli
sys.argv[0] = "llmcourse"
cli()"""


def interrupted(second, room):
    "Code, what the run said last, and whether its folder is as it should be."
    data, wheel = room / "votes.jsonl", room / f"wheel{second}"
    asked = [(f"What is {40 + i} + {30 + i}?", f"Answer: {70 + 2 * i}") for i in range(16)]
    votes = [{"prompt": prompt, "reply": reply, "vote": 1} for prompt, reply in asked]
    data.write_text("\n".join(map(json.dumps, votes)))
    words = ["flywheel", "run", "--data", str(data), "--n", "4", "--output", str(wheel)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen([sys.executable, "-c", CODE, *words], **both)
    time.sleep(second)
    over = run.poll() is not None
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=120)[0].strip().splitlines()
    return {"second": second, "over": over, "code": run.returncode, "said": said[-1] if said else "",
            "tidy": not wheel.exists() or (wheel / "live.json").is_file()}


if __name__ == "__main__":
    lost = 0
    with tempfile.TemporaryDirectory() as room:
        for second in map(float, sys.argv[1:] or range(2, 18, 2)):
            found = interrupted(second, Path(room))
            print(found, flush=True)
            lost += not found["over"] and (found["code"] != 130 or not found["tidy"])
    sys.exit(lost > 0)
