import json
import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from typer.testing import CliRunner

import real_subjects
from theodolite.commands import executor_of
from theodolite.core.errors import InputError, MissingExtraError, require
from theodolite.core.parallel import one_thread, seeds_for, spread
from theodolite.data.reusable_holdout import freedman_attack
from theodolite.parameters.subspace import measure_intrinsic_dimension
from theodolite.run_commands import run_app

TASKS = [(float(n),) for n in range(6)]
EXPECTED = [math.sqrt(n) for n in range(6)]


ATTACK = ["adaptive-data-analysis", "--attack", "200", "--repeats", "3", "--json"]


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
        here = CliRunner().invoke(run_app, ATTACK)
        there = CliRunner().invoke(run_app, [*ATTACK, "--dask", cluster.scheduler_address])
        assert here.exit_code == 0
        assert json.loads(there.stdout) == json.loads(here.stdout)
        with pytest.raises(ValueError, match=r"math domain|nonnegative"):
            spread(math.sqrt, [(-1.0,)], executor=pool)


def test_methods_give_the_same_numbers_in_two_processes():
    functions = (real_subjects.table_network, real_subjects.fit_to_zero, real_subjects.closeness_to_zero)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        attacks = [freedman_attack(100, 100, [5], repeats=3, executor=executor) for executor in (None, pool)]
        curves = [
            measure_intrinsic_dimension(*functions, [1, 4], seeds=(0, 1), search=search, executor=executor).curve.runs
            for search in ("grid", "bisect")
            for executor in (None, pool)
        ]
    assert (attacks[0].reported == attacks[1].reported).all()
    assert (curves[0] == curves[1]).all()
    assert (curves[2] == curves[3]).all()


def test_no_scheduler_at_an_address_is_an_error():
    with pytest.raises(InputError, match="no Dask scheduler"), executor_of(None, "tcp://127.0.0.1:1"):
        pass


def test_the_first_failure_is_raised():
    with pytest.raises(ZeroDivisionError):
        spread(divmod, [(1, 1), (1, 0)])


def test_each_result_is_told_as_it_comes():
    told = []
    assert spread(math.sqrt, TASKS, on_result=lambda *how_many: told.append(how_many)) == spread(math.sqrt, TASKS)
    assert told == [(i + 1, len(TASKS)) for i in range(len(TASKS))]


def test_no_workers_is_an_error():
    with pytest.raises(InputError, match="at least 1"):
        spread(math.sqrt, TASKS, executor=0)


def test_small_work_runs_on_one_thread_and_the_number_comes_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    with one_thread(False):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_seeds_are_repeatable_and_different():
    assert seeds_for(3, 5) == seeds_for(3, 5)
    assert len(set(seeds_for(0, 100)) | set(seeds_for(1, 100))) == 200


def test_a_missing_extra_is_named():
    with pytest.raises(MissingExtraError, match=r"theodolite\[graphs\]"):
        require("no_such_module_anywhere", "graphs")
