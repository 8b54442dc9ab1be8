"""Single sign-on as Streamlit does it: its settings, its signed cookie, the beginning of its login. Draws nothing."""

import json
from collections.abc import Mapping
from typing import Any, Final

from streamlit.auth_util import (
    encode_provider_token,
    get_cookie_with_chunks,
    get_secrets_auth_section,
    get_validated_redirect_uri,
    is_authlib_installed,
    validate_auth_credentials,
)
from streamlit.errors import StreamlitAuthError
from streamlit.web.server.server_util import get_cookie_secret
from streamlit.web.server.starlette.starlette_app_utils import decode_signed_value
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

from core.access.sign_on import LONGEST_DAYS, SignOn
from core.errors import InputError, MachineError

LEAST_SECRET_CHARACTERS: Final = 32


def make_sign_on(allowed: frozenset[str], trusts_addresses: bool) -> SignOn:
    """Raises MachineError without Authlib, InputError if `[auth]` in the secrets is missing, half filled or weakly signed."""
    if not is_authlib_installed():
        raise MachineError("access.no_authlib")
    section = get_secrets_auth_section()
    named = [name for name, value in section.items() if isinstance(value, Mapping) and "client_id" in value]
    provider = "default" if "client_id" in section or not named else named[0]
    try:
        validate_auth_credentials(provider)
    except StreamlitAuthError as error:
        raise InputError("access.no_sign_on", reason=" ".join(str(error).split())) from error
    if get_validated_redirect_uri() is None:
        raise InputError("access.no_sign_on", reason="redirect_uri: …/oauth2callback")
    if len(get_cookie_secret()) < LEAST_SECRET_CHARACTERS:
        raise InputError("access.short_cookie_secret", least=LEAST_SECRET_CHARACTERS)
    return SignOn(
        allowed, read_claims, lambda: f"/auth/login?provider={encode_provider_token(provider)}", trusts_addresses
    )


def read_claims(cookies: Mapping[str, str]) -> Mapping[str, Any] | None:
    """What Streamlit's identity cookie says, if its signature holds and it is not too old; None for any other cookie."""

    def one(name: str) -> bytes | None:
        value = cookies.get(name)
        return decode_signed_value(get_cookie_secret(), name, value, LONGEST_DAYS) if value else None

    held = get_cookie_with_chunks(one, USER_COOKIE_NAME)
    try:
        claims = json.loads(held) if held else None
    except ValueError:
        return None
    return claims if isinstance(claims, dict) else None
