import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from theodolite.core.errors import InputError, MissingExtraError, require
from theodolite.core.parallel import seeds_for, spread

TASKS = [(float(n),) for n in range(6)]
EXPECTED = [math.sqrt(n) for n in range(6)]


def test_in_process_threads_and_processes_agree():
    with ThreadPoolExecutor(2) as pool:
        assert spread(math.sqrt, TASKS, executor=pool) == EXPECTED
    assert spread(math.sqrt, TASKS) == EXPECTED
    assert spread(math.sqrt, TASKS, executor=2) == EXPECTED


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_real_dask_cluster_of_two_workers_agrees():
    distributed = require("distributed", "distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as cluster,
        distributed.Client(cluster) as client,
    ):
        pool = client.get_executor()
        assert len(client.scheduler_info()["workers"]) == 2
        assert spread(math.sqrt, TASKS, executor=pool) == EXPECTED
        with pytest.raises(ValueError, match=r"math domain|nonnegative"):
            spread(math.sqrt, [(-1.0,)], executor=pool)


def test_the_first_failure_is_raised():
    with pytest.raises(ZeroDivisionError):
        spread(divmod, [(1, 1), (1, 0)])


def test_no_workers_is_an_error():
    with pytest.raises(InputError, match="at least 1"):
        spread(math.sqrt, TASKS, executor=0)


def test_seeds_are_repeatable_and_different():
    assert seeds_for(3, 5) == seeds_for(3, 5)
    assert len(set(seeds_for(0, 100)) | set(seeds_for(1, 100))) == 200


def test_a_missing_extra_is_named():
    with pytest.raises(MissingExtraError, match=r"theodolite\[graphs\]"):
        require("no_such_module_anywhere", "graphs")
