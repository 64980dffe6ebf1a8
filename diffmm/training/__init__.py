"""Everything around the loss: state, step, mesh, checkpoints, metrics, shutdown.

A training script composes these parts in the open; nothing here owns the loop.

| module | what lives there |
|---|---|
| ``state`` | `TrainState`: step, parameters, optimiser state, key |
| ``step`` | `make_train_step`: a pure update, the same for any micro-batching |
| ``sharding`` | one table from logical axis names to mesh axes |
| ``checkpoint`` | `Checkpointer`: state, data iterator and tokenizers, bit-exact |
| ``metrics`` | JSON lines, TensorBoard events and progress on the terminal |
| ``interrupts`` | stop cleanly on a signal, or on a loss that is not finite |
| ``results`` | `write_result`: the last line of every example and benchmark |

Losses and metrics are sums over rows, already divided by global denominators, so
that neither devices, hosts nor micro-batches change a number.
"""

from diffmm.training.checkpoint import Checkpointer as Checkpointer
from diffmm.training.checkpoint import CheckpointWriteError as CheckpointWriteError
from diffmm.training.checkpoint import Restored as Restored
from diffmm.training.checkpoint import (
    UnreadableCheckpointError as UnreadableCheckpointError,
)
from diffmm.training.interrupts import GracefulShutdown as GracefulShutdown
from diffmm.training.interrupts import NonFiniteLossError as NonFiniteLossError
from diffmm.training.interrupts import check_finite as check_finite
from diffmm.training.metrics import MetricsWriter as MetricsWriter
from diffmm.training.metrics import Progress as Progress
from diffmm.training.metrics import read_metrics as read_metrics
from diffmm.training.options import config_from_flags as config_from_flags
from diffmm.training.options import define_flags as define_flags
from diffmm.training.options import option as option
from diffmm.training.options import parse_flags as parse_flags
from diffmm.training.options import run_from_flags as run_from_flags
from diffmm.training.results import environment as environment
from diffmm.training.results import to_jsonable as to_jsonable
from diffmm.training.results import write_atomically as write_atomically
from diffmm.training.results import write_result as write_result
from diffmm.training.sharding import DATA_PARALLEL as DATA_PARALLEL
from diffmm.training.sharding import FULLY_SHARDED as FULLY_SHARDED
from diffmm.training.sharding import (
    FULLY_SHARDED_TENSOR_PARALLEL as FULLY_SHARDED_TENSOR_PARALLEL,
)
from diffmm.training.sharding import LOGICAL_AXES as LOGICAL_AXES
from diffmm.training.sharding import TENSOR_PARALLEL as TENSOR_PARALLEL
from diffmm.training.sharding import make_mesh as make_mesh
from diffmm.training.sharding import partition_spec as partition_spec
from diffmm.training.sharding import shard_batch as shard_batch
from diffmm.training.sharding import shardings as shardings
from diffmm.training.sharding import state_shardings as state_shardings
from diffmm.training.state import TrainState as TrainState
from diffmm.training.state import init_state as init_state
from diffmm.training.step import LossFn as LossFn
from diffmm.training.step import make_train_step as make_train_step
