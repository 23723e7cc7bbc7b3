"""Dynamic sampling: which groups are drawn again, and which prompts take their place."""

from __future__ import annotations

from megatron_real.objective import make_objective
from megatron_real.prompts import PromptCursor
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from megatron_real.rollout.refill import refill

REAL = make_objective("real")

# What the rollouts of each prompt turn out to be.
LABELS = {
    "mixed": (1, 0, -1),
    "solved": (1, 1, 1),
    "hopeless": (0, -1, 0),
    "unknown": (-1, -1, -1),
    "mixed too": (0, 0, 1),
}


class Source:
    """Draws prompts with a real cursor and labels their rollouts by LABELS."""

    def __init__(self, *names: str) -> None:
        prompts = [Prompt(name, "", (1,), ("",)) for name in names]
        self.cursor = PromptCursor(prompts, seed=0, shuffle=False)
        self.asked: list[tuple[int, int]] = []

    def draw(self, num_prompts: int, number: int) -> list[Rollout]:
        self.asked.append((num_prompts, number))
        return [
            Rollout(
                prompt,
                group,
                sample,
                Completion((7,), (0.0,), "", True),
                Verdict(Status.OK, Label(label), 1.0),
            )
            for group, prompt in enumerate(self.cursor.next_batch(num_prompts))
            for sample, label in enumerate(LABELS[prompt.uid])
        ]


def groups(rollouts: list[Rollout]) -> list[tuple[int, str, int]]:
    """Returns (group, prompt, refills) of each group, and asserts that all are whole
    and in order.
    """
    assert [(r.group, r.sample) for r in rollouts] == [
        (i, k) for i in range(len(rollouts) // 3) for k in range(3)
    ]
    return list(dict.fromkeys((r.group, r.prompt.uid, r.refills) for r in rollouts))


def test_groups_of_one_class_give_way_to_fresh_prompts_up_to_the_bound() -> None:
    names = [
        "solved",
        "mixed",
        "hopeless",
        "unknown",
        "mixed too",
        "solved",
        "hopeless",
        "mixed",
        "solved",
    ]
    expected = [
        [(0, "solved", 0), (1, "mixed", 0), (2, "hopeless", 0), (3, "unknown", 0)],
        [(0, "mixed too", 1), (1, "mixed", 0), (2, "solved", 1), (3, "hopeless", 1)],
        [(0, "mixed too", 1), (1, "mixed", 0), (2, "mixed", 2), (3, "solved", 2)],
    ]

    for rounds, wanted in enumerate(expected):
        source = Source(*names)
        assert groups(refill(source.draw(4, 0), REAL, rounds=rounds, draw=source.draw)) == wanted
        assert source.asked == [(4, 0), (3, 1), (2, 2)][: rounds + 1]


def test_nothing_is_drawn_when_every_group_is_mixed() -> None:
    source = Source("mixed", "mixed too")
    assert groups(refill(source.draw(2, 0), REAL, rounds=5, draw=source.draw)) == [
        (0, "mixed", 0),
        (1, "mixed too", 0),
    ]
    assert source.asked == [(2, 0)]
