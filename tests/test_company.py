"""A partial batch waits for company only where company can come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from parts import OPTIONS, BrightIsCell, input_file, write_smear

from bcseg_batch.items import InputFile, Status
from bcseg_batch.service.pipeline import Pipeline
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder

LONG_WAIT_S = 60.0


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_that_nobody_will_join_goes_at_once(tmp_path: Path, count: int) -> None:
    files = [
        input_file(write_smear(tmp_path / "in" / f"{number}.png", number), tmp_path / "in")
        for number in range(count)
    ]
    through = 0
    began_s = time.monotonic()

    def feed() -> Iterator[InputFile | None]:
        yield from files
        while through < count:
            assert time.monotonic() - began_s < LONG_WAIT_S / 2
            yield None

    predictor = BrightIsCell()
    with OutputFolder(tmp_path / "out") as outputs:
        pipeline = Pipeline(
            [predictor],
            outputs,
            OutputNames(),
            replace(OPTIONS, max_wait_s=LONG_WAIT_S, batch_size=4),
            expects_company=lambda: False,
        )
        for outcome in pipeline.process(feed()):
            assert outcome.status is Status.DONE
            through += 1
    assert predictor.batches == [count]  # together, although nothing was waited for


def test_a_batch_that_others_may_join_waits_for_them(tmp_path: Path) -> None:
    files = [
        input_file(write_smear(tmp_path / "in" / f"{number}.png", number), tmp_path / "in")
        for number in range(4)
    ]

    def feed() -> Iterator[InputFile | None]:
        for file in files:
            yield file
            for _ in range(50):
                yield None

    predictor = BrightIsCell()
    with OutputFolder(tmp_path / "out") as outputs:
        pipeline = Pipeline(
            [predictor],
            outputs,
            OutputNames(),
            replace(OPTIONS, max_wait_s=LONG_WAIT_S, batch_size=4),
            expects_company=lambda: True,
        )
        assert len(list(pipeline.process(feed()))) == 4
    assert predictor.batches == [4]
