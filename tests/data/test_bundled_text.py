import ast

from tl_sparse.data.bundled_text import bundled_text


def test_its_documents_are_whole_modules_of_python():
    documents = bundled_text()
    assert len(documents) > 20
    assert len(set(documents)) == len(documents)
    for document in documents:
        assert ast.get_docstring(ast.parse(document))
        assert document.endswith("\n")
