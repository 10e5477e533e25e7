"""What other trainers call their settings is answered with what to do here."""

import pytest

from prepare_sft import PrepareSettings
from sft import elsewhere
from sft.config import load_settings
from sft.errors import UserError
from train_sft import TrainSettings

ANSWERS = [
    pytest.param(cls, answers, name, id=f"{cls.__name__}-{name}")
    for cls, answers in ((PrepareSettings, elsewhere.PREPARE), (TrainSettings, elsewhere.TRAIN))
    for name in answers
    if "=" not in name
]


@pytest.mark.parametrize(("cls", "answers", "name"), ANSWERS)
def test_a_name_from_elsewhere_is_no_setting_and_is_answered_with_its_sentence(cls, answers, name):
    assert name not in cls.__dataclass_fields__
    with pytest.raises(UserError) as caught:
        load_settings(cls, [f"--{name}=1"], elsewhere=answers)
    assert f"  command line: unknown setting '{name}'; {answers[name]}" in str(caught.value).splitlines()


@pytest.mark.parametrize("former", [name for name in elsewhere.TRAIN if "=" in name])
def test_a_value_that_was_right_once_is_answered_with_what_to_write_now(former):
    with pytest.raises(UserError) as caught:
        load_settings(TrainSettings, [f"--{former}"], elsewhere=elsewhere.TRAIN)
    name, _, value = former.partition("=")
    (line,) = [line for line in str(caught.value).splitlines() if f"{name} must be" in line]
    assert line.endswith(f"not '{value}'; {elsewhere.TRAIN[former]}")
