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
]


@pytest.mark.parametrize(("cls", "answers", "name"), ANSWERS)
def test_a_name_from_elsewhere_is_no_setting_and_is_answered_with_its_sentence(cls, answers, name):
    assert name not in cls.__dataclass_fields__
    with pytest.raises(UserError) as caught:
        load_settings(cls, [f"--{name}=1"], elsewhere=answers)
    assert f"  command line: unknown setting '{name}'; {answers[name]}" in str(caught.value).splitlines()
