"""docs/postgres-map.md has a row for everything, and cites what exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pgbgw"
PAGE = (ROOT / "docs" / "postgres-map.md").read_text()


def words(text: str) -> list[str]:
    return text.split()


# Every function that PostgreSQL 12's bgworker.c defines.
BGWORKER_C = words("""
    BackgroundWorkerEntry BackgroundWorkerShmemInit BackgroundWorkerShmemSize
    BackgroundWorkerStateChange BackgroundWorkerStopNotifications bgworker_die bgworker_quickdie
    bgworker_sigusr1_handler FindRegisteredWorkerBySlotNumber ForgetBackgroundWorker
    ForgetUnstartedBackgroundWorkers GetBackgroundWorkerPid GetBackgroundWorkerTypeByPid
    LookupBackgroundWorkerFunction RegisterBackgroundWorker RegisterDynamicBackgroundWorker
    ReportBackgroundWorkerExit ReportBackgroundWorkerPID ResetBackgroundWorkerCrashTimes
    SanityCheckBackgroundWorker StartBackgroundWorker TerminateBackgroundWorker
    WaitForBackgroundWorkerShutdown WaitForBackgroundWorkerStartup
""")

# What it calls elsewhere that is about workers, and who calls it in the postmaster.
AROUND = words("""
    assign_backendlist_entry ascii_safe_strlcpy BackgroundWorkerBlockSignals
    BackgroundWorkerInitializeConnection BackgroundWorkerUnblockSignals bgworker_forkexec
    bgworker_should_start_now CHECK_FOR_INTERRUPTS CleanupBackgroundWorker DetermineSleepTime
    do_start_bgworker dsm_detach_all FloatExceptionHandler HandleChildCrash init_ps_display
    InitProcess load_external_function LogChildExit LWLockAcquire maybe_start_bgworkers
    PGSharedMemoryDetach pg_memory_barrier pg_read_barrier pg_write_barrier pmdie
    PostmasterMarkPIDForWorkerNotify PostmasterStateMachine proc_exit procsignal_sigusr1_handler
    reaper ResetLatch SendPostmasterSignal ServerLoop SetLatch sigusr1_handler
    StatementCancelHandler WaitLatch
""")

# Types, fields, flags, states, constants, variables and settings in it.
NAMES = words("""
    BackgroundWorker BackgroundWorkerArray BackgroundWorkerData BackgroundWorkerHandle
    BackgroundWorkerList BackgroundWorkerLock BackgroundWorkerSlot bgw_extra bgw_flags
    bgw_function_name BGWH_NOT_YET_STARTED BGWH_POSTMASTER_DIED BGWH_STARTED BGWH_STOPPED
    BgwHandleStatus bgw_library_name bgw_main_arg bgw_name bgw_notify_pid BGW_EXTRALEN BGW_MAXLEN
    BGW_NEVER_RESTART BGWORKER_BACKEND_DATABASE_CONNECTION BGWORKER_CLASS_PARALLEL
    BGWORKER_SHMEM_ACCESS BgWorkerStart_ConsistentState BgWorkerStart_PostmasterStart
    BgWorkerStart_RecoveryFinished bgw_restart_time bgw_start_time bgw_type generation
    InternalBGWorkers InvalidPid in_use IsUnderPostmaster MAX_BACKENDS MAX_PARALLEL_WORKER_LIMIT
    max_parallel_workers max_worker_processes MyBgworkerEntry parallel_register_count
    parallel_terminate_count pid PMSIGNAL_BACKGROUND_WORKER_CHANGE PostAuthDelay post_auth_delay
    process_shared_preload_libraries_in_progress RegisteredBgWorker restart_after_crash rw_backend
    rw_child_slot rw_crashed_at rw_lnode rw_pid rw_shmem_slot rw_terminate rw_worker
    shared_preload_libraries terminate total_slots WL_LATCH_SET WL_POSTMASTER_DEATH
""")

ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| PostgreSQL |"))
]


@pytest.mark.parametrize("names", [BGWORKER_C, AROUND], ids=["bgworker.c", "around it"])
def test_every_function_has_a_row(names: list[str]) -> None:
    found = [name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])]
    assert [name for name in names if found.count(name) != 1] == []


def test_every_other_name_is_in_a_row() -> None:
    found = {name for row in ROWS for name in re.findall(r"\w+", " ".join(row))}
    assert [name for name in NAMES if name not in found] == []


def test_every_row_is_complete() -> None:
    for row in ROWS:
        assert len(row) == 4, row
        assert all(row), row


# --- what it cites --------------------------------------------------------------------------------


def exists(file: str, name: str) -> bool:
    """Whether a file of the package defines that name; of a class's members, "Class.member"."""
    if file.endswith(".py"):
        return name in _names_in(file)
    text = (PACKAGE / file).read_text()
    *owner, member = name.split(".")
    if owner and not re.search(rf"^cdef class {owner[0]}\b", text, re.MULTILINE):
        return False
    word = re.escape(member)
    if file.endswith(".pyx"):
        return bool(re.search(rf"^\s*(?:cp?def .*?|def |cdef class ){word}\b", text, re.MULTILINE))
    # A function starts a line, a type's name ends a definition, a macro is defined.
    definition = rf"^{word}\(|^\}} {word};|^#define {word}\b|^typedef .*\b{word};"
    return bool(re.search(definition, text, re.MULTILINE))


@cache
def _names_in(file: str) -> set[str]:
    return _python_names(ast.parse((PACKAGE / file).read_text()))


def _python_names(tree: ast.AST, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                names |= _python_names(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {prefix + t.id for t in targets if isinstance(t, ast.Name)}
    return names


def test_every_place_exists() -> None:
    cited = {
        (file, name)
        for row in ROWS
        for cell in (row[1], row[3])
        for file, name in re.findall(r"`(\w+\.(?:py|pyx|h)):([\w.]+)`", cell)
    }
    assert len(cited) > 80
    assert [f"{file}:{name}" for file, name in sorted(cited) if not exists(file, name)] == []
    # In the second column stands nothing else.
    for row in ROWS:
        assert row[1] == "-" or re.fullmatch(r"(?:`\w+\.(?:py|pyx|h):[\w.]+`(?:, )?)+", row[1]), row


def test_every_test_exists() -> None:
    folder = ROOT / "tests"
    paths = folder.rglob("test_*.py")
    tests = {str(path.relative_to(folder)): path.read_text() for path in paths}
    everything = "\n".join(tests.values())
    names = re.findall(r"^(?:async )?def (test_\w+)", everything, re.MULTILINE)
    ids = {i for name in names for i in re.findall(r"(?<=_)[A-J]\d\d(?=_)", name)}
    for row in ROWS:
        text = f"{row[2]} {row[3]}"
        cited = set(re.findall(r"\b[A-J]\d\d\b", text))
        for group, first, last in re.findall(r"\b([A-J])(\d\d) to \1(\d\d)\b", text):
            cited |= {f"{group}{n:02}" for n in range(int(first), int(last))}
        assert cited <= ids, f"{row[0]}: {sorted(cited - ids)}"
        named = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", row[2])
        for file, name in named:
            assert file in tests, row
            assert not name or f"def {name}(" in tests[file], f"{file}:{name}"
        # Whatever works is shown to work.
        assert row[2] == "-" or cited or named, row
