from pathlib import Path

import pytest

from gptmoe.text import Tokenizer, train_jiebabpe

LINES = [
    "清晨的河面上有一层薄雾，渔船慢慢地离开了码头。",
    "春天来了，山坡上的杏花开得正好，孩子们跑来跑去。",
    "他把旧书放在窗台上，窗外的雨下了一整夜。",
    "秋风吹过稻田，稻穗轻轻摇动，像是在说话。",
    "冬天的夜里，炉火很暖，祖母讲起从前的故事。",
    "Hello world, version 2.0 is here!\t末尾有制表符",
    "第一行\n第二行\r\n第三行  两个空格",
    "月亮升起来了，照着河面，照着山坡，照着稻田。",
]


@pytest.fixture(scope="session")
def lines() -> list[str]:
    return list(LINES)


@pytest.fixture(scope="session")
def chinese() -> Tokenizer:
    return train_jiebabpe(LINES, 400)


@pytest.fixture
def chinese_folder(chinese: Tokenizer, tmp_path: Path) -> Path:
    chinese.save(tmp_path / "chinese")
    return tmp_path / "chinese"
