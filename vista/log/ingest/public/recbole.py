"""RecBole's files: tab-separated text, whose header gives the type of each field, such as `age:token`."""

from __future__ import annotations

from pathlib import Path

from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import FileScan
from vista.log.ingest.public.file_form import FileForm
from vista.log.ingest.public.public_set import PublicSet
from vista.log.ingest.text_files import read_header, scan_text

USER = "user_id"
KIND_OF_TYPE = {"token": "category", "float": "number"}


def read_users(file: Path) -> FileScan:
    """The users of a file: tokens are categories, and floats are numbers. Fields that are sequences are left out.

    Raises:
        DataError: if the file has no ids of users.
    """
    header = read_header(file, "\t", None)
    fields = [name.partition(":") for name in header]
    check_columns(str(file), {"user": USER}, [field for field, _, _ in fields], "users", "write the file again")
    layout = [
        "user" if field == USER else f"{KIND_OF_TYPE[kind]}:{field}" if kind in KIND_OF_TYPE else ""
        for field, _, kind in fields
    ]
    columns = {name: own for name, own in zip(layout, header, strict=True) if name}
    return FileScan(scan_text(file, layout, "\t", None, 1), columns, is_text=True)


RECBOLE = PublicSet(events=(FileForm(("*.inter",)),), users=(FileForm(("*.user",), read=read_users),))
