"""Jobs shared out to processes."""

import joblib

from sweeps.parallel import Workers


class OneByOne:
    """A pool that asks for a job after each result, as joblib's does from a thread of its own."""

    def __init__(self, **_):
        pass

    def __call__(self, calls):
        for function, arguments, options in calls:
            yield function(*arguments, **options)


def test_a_pool_may_ask_for_jobs_while_others_finish(monkeypatch):
    monkeypatch.setattr(joblib, "Parallel", OneByOne)
    found = dict(Workers(count=2).map(lambda job, _device: 2 * job, range(9)))
    assert found == {key: 2 * key for key in range(9)}
