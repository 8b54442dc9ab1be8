"""Tells another program about a run: one JSON POST an event. Stdlib only; knows the formats of group robots, not what happened.

Feishu: open.feishu.cn/document/client-docs/bot-v3/add-custom-bot; DingTalk: open.dingtalk.com/document/robots/custom-robot-access;
WeCom: developer.work.weixin.qq.com/document/path/91770. Everything else gets all fields, with `text` as Slack and Mattermost read it.
"""

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from core.errors import InputError, MachineError

_TIMEOUT_SECONDS: Final = 10.0
_FEISHU: Final = ("open.feishu.cn", "open.larksuite.com")
_DINGTALK_AND_WECOM: Final = ("oapi.dingtalk.com", "qyapi.weixin.qq.com")


def post(url: str, event: Mapping[str, Any]) -> None:
    """Send one event. `event["text"]` is the sentence for people. Takes up to ten seconds.

    Raises InputError for what is no http address, MachineError if nobody answers or the answer is no success.
    """
    import urllib.request  # ssl takes 10 MB, which a supervisor without a webhook does not need
    from http.client import HTTPException

    check(url)
    request = urllib.request.Request(  # noqa: S310 - check() lets only http and https through
        url,
        data=json.dumps(body_for(url, event), ensure_ascii=False).encode(),
        headers={"Content-Type": "application/json; charset=utf-8", "User-Agent": "danlu"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
            answer.read(4096)
    except (OSError, HTTPException, ValueError) as error:
        raise MachineError("health.webhook_failed", host=urlsplit(url).hostname or url, reason=str(error)) from error


def check(url: str) -> None:
    """Raises InputError unless `url` is an http or https address."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError("health.bad_webhook", url=url) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or any(character.isspace() for character in url):
        raise InputError("health.bad_webhook", url=url)


def body_for(url: str, event: Mapping[str, Any]) -> dict[str, Any]:
    """What the receiver at `url` understands."""
    host = urlsplit(url).hostname
    if host in _FEISHU:
        return {"msg_type": "text", "content": {"text": event["text"]}}
    if host in _DINGTALK_AND_WECOM:
        return {"msgtype": "text", "text": {"content": event["text"]}}
    return dict(event)
