"""Typed configuration: one dataclass per section, merged from YAML and ``key=value`` overrides.

A configuration never imports code: every choice is a name or a number that a dataclass lists.
"""

from pbe.config.checks import CHOICES as CHOICES, PATHS as PATHS, RANGES as RANGES
from pbe.config.data import (
    AugmentConfig as AugmentConfig,
    CacheConfig as CacheConfig,
    DataConfig as DataConfig,
    SampleConfig as SampleConfig,
)
from pbe.config.fields import (
    differences as differences,
    fingerprint as fingerprint,
    flatten as flatten,
    to_dict as to_dict,
)
from pbe.config.loading import from_dict as from_dict, load_config as load_config, save_yaml as save_yaml
from pbe.config.model import (
    AutoencoderConfig as AutoencoderConfig,
    ExemplarEncoderConfig as ExemplarEncoderConfig,
    ModelConfig as ModelConfig,
    ScheduleConfig as ScheduleConfig,
    UNetConfig as UNetConfig,
)
from pbe.config.training import (
    AutoencoderLossConfig as AutoencoderLossConfig,
    Config as Config,
    DistillationConfig as DistillationConfig,
    LoggingConfig as LoggingConfig,
    LoraConfig as LoraConfig,
    ObjectiveConfig as ObjectiveConfig,
    OptimizerConfig as OptimizerConfig,
    TrainerConfig as TrainerConfig,
)
