"""Sets with reports (MIMIC-CXR, Open-i, a folder of one's own), and the tables under all readers."""

import gzip
import tarfile
import zipfile

import numpy as np
import pytest
from MMCLIP.image_processing_mmclip import load_shrunk
from public_sets import draw, labels, read, write_table

from MMCLIP.data.manifest import check_rows, rows_to_dataset
from MMCLIP.data.readers import LEFT_OUT, source_rows
from MMCLIP.data.readers.mimic_cxr import LABELS as MIMIC_LABELS
from MMCLIP.data.readers.tables import decode_text, find_file, hashed_share, labels_of, raise_problem, read_table


# ------------------------------------------------------------------------------------------------------------ MIMIC-CXR

FILMS = {  # dicom_id -> subject, study, view, split
    "aaaaaaaa-1": ("10000032", "50000001", "PA", "train"),
    "aaaaaaaa-2": ("10000032", "50000001", "LATERAL", "train"),
    "bbbbbbbb-1": ("10000048", "50000002", "AP", "validate"),
    "cccccccc-1": ("11000011", "50000003", "", "test"),
    "cccccccc-2": ("11000011", "50000003", "PA LLD", "test"),
    "dddddddd-1": ("11000022", "50000004", "LL", "test"),
    "eeeeeeee-1": ("11000033", "50000005", "AP", "test"),
}
REPORTS = {
    "50000001": " FINAL REPORT\n INDICATION: ___F with cough.\n \n FINDINGS: \n \n Lungs are clear\n \n"
    " IMPRESSION: \n \n No mass.\n",
    "50000002": " WET READ: Seen.\n \n IMPRESSION: Edema, as on ___.\n",
    "50000003": " Compared with ___.\n \n Heart is large. ",
}  # fmt: skip


def place_of(film):
    subject, study = FILMS[film][:2]
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def write_gzip(path, *lines):
    write_table(path.with_suffix(""), *lines)
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    path.with_suffix("").unlink()


def mimic(folder, reports=None):
    write_gzip(
        folder / "mimic-cxr-2.0.0-metadata.csv.gz",
        ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"],
        *(
            [film, subject, study, "CHEST (PA AND LAT)", view, 3056]
            for film, (subject, study, view, _) in FILMS.items()
        ),
    )
    write_gzip(
        folder / "mimic-cxr-2.0.0-split.csv.gz",
        ["dicom_id", "study_id", "subject_id", "split"],
        *([film, study, subject, split] for film, (subject, study, _, split) in FILMS.items()),
    )
    header = ["subject_id", "study_id", *MIMIC_LABELS]
    write_gzip(
        folder / "mimic-cxr-2.0.0-chexpert.csv.gz",
        header,
        mimic_labels("10000032", "50000001", No_Finding="1.0"),
        mimic_labels("10000048", "50000002", Edema="1.0", Lung_Opacity="-1.0", Fracture="0.0"),
        mimic_labels("11000022", "50000004", Lung_Opacity="1.0"),
        mimic_labels("11000033", "50000005"),
    )
    write_gzip(folder / "mimic-cxr-2.0.0-negbio.csv.gz", header, mimic_labels("10000048", "50000002", Pneumonia="1.0"))
    for study, text in (REPORTS if reports is None else reports).items():
        film = next(film for film in FILMS if FILMS[film][1] == study)
        path = folder / f"{place_of(film)}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    draw(*(folder / place_of(film) / f"{film}.jpg" for film in FILMS))
    return folder


def mimic_labels(*ids, **stated):
    return [*ids, *(stated.get(name.replace(" ", "_"), "") for name in MIMIC_LABELS)]


def test_mimic_cxr_pairs_each_film_with_the_report_and_labels_of_its_study(tmp_path):
    rows, problems = read("mimic-cxr", mimic(tmp_path))
    check_rows(rows_to_dataset(rows.values()))
    assert {name: row["report"] for name, row in rows.items()} == {
        "aaaaaaaa-1": "Lungs are clear. No mass.",
        "aaaaaaaa-2": "Lungs are clear. No mass.",
        "bbbbbbbb-1": "Edema, as on.",
        "cccccccc-1": "Heart is large.",
        "cccccccc-2": "Heart is large.",
        "dddddddd-1": None,
    }
    assert [row["split"] for row in rows.values()] == ["train", "train", "val", "test", "test", "test"]
    assert [row["view"] for row in rows.values()] == ["PA", "LATERAL", "AP", "", "OTHER", "LATERAL"]
    assert labels(rows["aaaaaaaa-2"]) == {"present": ["no finding"]}
    assert labels(rows["bbbbbbbb-1"]) == {
        "present": ["edema"], "absent": ["fracture"], "uncertain": ["lung opacity"]
    }  # fmt: skip
    assert labels(rows["cccccccc-1"]) == {}  # a study without a line in the label table
    assert (rows["bbbbbbbb-1"]["patient_id"], rows["bbbbbbbb-1"]["study_id"]) == ("10000048", "50000002")
    # neither text nor labels
    assert [reason for _, reason in problems] == [
        LEFT_OUT + "study s50000005 has neither a text (findings+impression) nor labels"
    ]


def test_trap_6_mimic_cxr_radiologist_labels_call_a_column_otherwise_and_win(tmp_path):
    header = ["study_id", *("Airspace Opacity" if name == "Lung Opacity" else name for name in MIMIC_LABELS)]
    write_table(
        mimic(tmp_path) / "mimic-cxr-2.1.0-test-set-labeled.csv",
        header,
        mimic_labels("50000004", Lung_Opacity="0.0", Pneumonia="-1.0"),
        mimic_labels("50000005", Lung_Opacity="1.0"),
    )
    rows, problems = read("mimic-cxr", tmp_path)
    assert problems == []
    assert labels(rows["dddddddd-1"]) == {"absent": ["lung opacity"], "uncertain": ["pneumonia"]}
    assert labels(rows["eeeeeeee-1"]) == {"present": ["lung opacity"]}
    assert labels(rows["bbbbbbbb-1"])["present"] == ["edema"]  # not in the radiologist's table


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("findings+impression", "Lungs are clear. No mass.", "Edema, as on."),
        ("impression", "No mass.", "Edema, as on."),
        ("impression or findings", "No mass.", "Edema, as on."),
        ("findings", "Lungs are clear.", None),
        ("longer", "Lungs are clear.", "Edema, as on."),
        ("mimic-cxr", "No mass.", "Edema, as on."),
        ("none", None, None),
    ],
)
def test_mimic_cxr_text_is_made_of_the_sections_that_are_asked_for(tmp_path, text, first, second):
    rows, _ = read("mimic-cxr", mimic(tmp_path), text=text)
    assert (rows["aaaaaaaa-1"]["report"], rows["bbbbbbbb-1"]["report"]) == (first, second)


def test_mimic_cxr_reports_in_every_form_give_the_same_rows(tmp_path):
    rows, _ = read("mimic-cxr", mimic(tmp_path / "unpacked"))

    def same(folder, **options):
        found, _ = read("mimic-cxr", folder, **options)
        return {name: row["report"] for name, row in found.items()} == {n: row["report"] for n, row in rows.items()}

    archive = mimic(tmp_path / "zip", reports={}) / "mimic-cxr-reports.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for film, (_, study, _, _) in FILMS.items():
            if film.endswith("-1") and study in REPORTS:
                file.writestr(f"{place_of(film)}.txt", REPORTS[study])
    assert same(tmp_path / "zip")
    write_table(
        mimic(tmp_path / "table", reports={}) / "mimic_cxr_sectioned.csv",
        ["study", "impression", "findings", "last_paragraph", "comparison"],
        ["s50000001", "No mass.", "Lungs are clear", "", ""],
        ["s50000002", "Edema, as on ___.", "", "", ""],
        ["s50000003", "", "", "Heart is large.", ""],
    )
    assert same(tmp_path / "table")
    mimic(tmp_path / "elsewhere", reports={})
    assert same(tmp_path / "elsewhere", reports=str(tmp_path / "unpacked"))


def test_mimic_cxr_order_of_the_published_code_ends_with_the_comparison(tmp_path):
    table = mimic(tmp_path, reports={}) / "mimic_cxr_sectioned.csv"
    header = ["study", "impression", "findings", "last_paragraph", "comparison"]
    write_table(table, header, ["s50000002", "", "", "", "Edema since ___"])
    assert read("mimic-cxr", tmp_path, text="mimic-cxr")[0]["bbbbbbbb-1"]["report"] == "Edema since."
    assert read("mimic-cxr", tmp_path)[0]["bbbbbbbb-1"]["report"] is None
    write_table(table, header[:4], ["s50000002", "", "", "Edema"])  # copies go about without the column
    assert read("mimic-cxr", tmp_path, text="mimic-cxr")[0]["bbbbbbbb-1"]["report"] == "Edema."


def test_mimic_cxr_without_its_reports_is_an_error_that_says_where_they_are(tmp_path):
    with pytest.raises(ValueError, match="there are no reports.*They come with MIMIC-CXR, not with MIMIC-CXR-JPG"):
        list(source_rows("mimic-cxr", mimic(tmp_path, reports={})))


def test_mimic_cxr_labeller_can_be_chosen_and_another_is_an_error(tmp_path):
    rows, _ = read("mimic-cxr", mimic(tmp_path), labels="negbio")
    assert labels(rows["bbbbbbbb-1"]) == {"present": ["pneumonia"]}
    with pytest.raises(ValueError, match="labels is 'bert', expected 'chexpert' or 'negbio'"):
        list(source_rows("mimic-cxr", tmp_path, labels="bert"))
    with pytest.raises(ValueError, match="text is 'all', expected one of findings"):
        list(source_rows("mimic-cxr", tmp_path, text="all"))


def test_mimic_cxr_film_without_a_split_and_one_that_occurs_twice_are_reported(tmp_path):
    path = mimic(tmp_path) / "mimic-cxr-2.0.0-metadata.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode()
    lines += "ffffffff-1,10000032,50000001,CHEST,PA,1\naaaaaaaa-1,10000032,50000001,CHEST,PA,1\n"
    path.write_bytes(gzip.compress(lines.encode()))
    _, problems = read("mimic-cxr", tmp_path)
    reasons = [reason for _, reason in problems if not reason.startswith(LEFT_OUT)]
    assert "'ffffffff-1' has the split None" in reasons[0] and "'aaaaaaaa-1' occurs twice" in reasons[1]


# --------------------------------------------------------------------------------------------------------------- Open-i


def openi_xml(number, findings="", impression="", major=(), automatic=(), images=()):
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{number}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">XXXX.</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation><MeSH>{"".join(f"<major>{term}</major>" for term in major)}
{"".join(f"<automatic>{term}</automatic>" for term in automatic)}</MeSH>
{"".join(f'<parentImage id="{image}"><caption>PA and lateral</caption></parentImage>' for image in images)}
</eCitation>"""


def openi(folder):
    reports = folder / "ecgen-radiology"
    reports.mkdir(parents=True)
    films = [f"CXR1_1_IM-0001-{n}001" for n in (3, 4)]
    texts = {
        "1": openi_xml(1, "Lungs clear. XXXX.", "No disease", ["normal"], (), films),
        "2": openi_xml(
            2, "", "Effusion.", ["Pericardial Effusion"],
            ["Pericardial Effusion", "Atelectases", "Infiltrates"], ["CXR2_IM-0652-1001"],
        ),
        "10": openi_xml(10, "", "", ["No Indexing"], (), ["CXR10_IM-0002-1001"]),
        "11": openi_xml(11, "Fine.", "Normal.", ["normal"]),
        "12": "<html>not found</html>",
    }  # fmt: skip
    for name, text in texts.items():
        (reports / f"{name}.xml").write_text(text)
    return folder


def test_openi_reports_are_paired_with_each_film_and_the_index_gives_labels(tmp_path):
    openi(tmp_path)
    draw(*(tmp_path / "NLMCXR_png" / f"CXR1_1_IM-0001-{n}001.png" for n in (3, 4)))
    draw(tmp_path / "CXR2_IM-0652-1001.png")
    rows, problems = read("openi", tmp_path)
    check_rows(rows_to_dataset(rows.values()))
    assert {name: (row["report"], row["study_id"], row["patient_id"]) for name, row in rows.items()} == {
        "CXR1_1_IM-0001-3001.png": ("Lungs clear. No disease.", "CXR1", "CXR1"),
        "CXR1_1_IM-0001-4001.png": ("Lungs clear. No disease.", "CXR1", "CXR1"),
        "CXR2_IM-0652-1001.png": ("Effusion.", "CXR2", "CXR2"),
    }
    assert labels(rows["CXR1_1_IM-0001-3001.png"]) == {"present": ["no finding"]}
    # the index also says pericardial effusion, which is no pleural one
    assert labels(rows["CXR2_IM-0652-1001.png"]) == {"present": ["atelectasis", "infiltration"]}
    assert {row["split"] for row in rows.values()} == {""}
    reasons = [reason for _, reason in problems]
    assert reasons[:2] == [
        LEFT_OUT + "the report has no findings+impression",
        LEFT_OUT + "the report has no image",
    ]
    assert "not a report of Open-i" in reasons[2]


def test_openi_section_in_two_parts_or_with_mark_up_inside_is_read_whole(tmp_path):
    text = openi_xml(1, "Mass &lt;5 cm<sup>2</sup> seen", "Edema", ["Mass"], (), ["CXR1_1_IM-0001-3001"])
    more = '<AbstractText Label="IMPRESSION">Scar</AbstractText><AbstractText Label="FINDINGS"/></Abstract>'
    path = tmp_path / "ecgen-radiology" / "1.xml"
    path.parent.mkdir()
    path.write_text(text.replace("</Abstract>", more))
    (row,) = read("openi", tmp_path)[0].values()
    assert row["report"] == "Mass <5 cm2 seen. Edema. Scar."


def test_openi_archive_dicom_files_and_projections_are_read(tmp_path, caplog):
    rows, _ = read("openi", openi(tmp_path / "a"))
    assert "nobody knows which films are lateral" in caplog.text and {row["view"] for row in rows.values()} == {""}
    (tmp_path / "b").mkdir()
    with tarfile.open(tmp_path / "b/NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(tmp_path / "a/ecgen-radiology", "ecgen-radiology")
    draw(tmp_path / "b/NLMCXR_dcm/1/1_IM-0001-3001.dcm")
    write_table(
        tmp_path / "b/indiana_projections.csv",
        *("uid,filename,projection", "1,1_IM-0001-3001.dcm.png,Frontal", "1,1_IM-0001-4001.dcm.png,Lateral"),
    )
    packed, _ = read("openi", tmp_path / "b")
    found = {row["image"]["path"].rsplit("/", 1)[1]: row["view"] for row in packed.values()}
    assert found == {"1_IM-0001-3001.dcm": "", "CXR1_1_IM-0001-4001.png": "LATERAL", "CXR2_IM-0652-1001.png": ""}
    assert [row["report"] for row in packed.values()] == [row["report"] for row in rows.values()]


def test_openi_of_kaggle_has_projections_and_problems(tmp_path):
    write_table(
        tmp_path / "indiana_reports.csv",
        ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"],
        ["1", "normal", "normal", "Xray", "", "", "Lungs are clear and well.", "Normal"],
        ["2", "Opacity/left", "Opacity;Cardiomegaly", "Xray", "", "", "", "Opacity."],
        ["2", "normal", "normal", "Xray", "", "", "", "Again."],
    )
    write_table(
        tmp_path / "indiana_projections.csv",
        *("uid,filename,projection", "1,1_a.dcm.png,Frontal", "1,1_b.dcm.png,Lateral", "2,2_a.dcm.png,Frontal"),
        "2,2_b.dcm.png,Above",
    )
    draw(*(tmp_path / "images/images_normalized" / f"{name}.dcm.png" for name in ("1_a", "1_b", "2_a")))
    rows, problems = read("openi", tmp_path)
    check_rows(rows_to_dataset(rows.values()))
    assert [(row["view"], row["present"]) for row in rows.values()] == [
        ("", ["no finding"]), ("LATERAL", ["no finding"]), ("", ["cardiomegaly", "lung opacity"])
    ]  # fmt: skip
    assert ["expected Frontal or Lateral" in problems[0][1], "'2' occurs twice" in problems[1][1]] == [True, True]
    longer, _ = read("openi", tmp_path, text="longer")
    assert longer["1_a.dcm.png"]["report"] == "Lungs are clear and well."


def test_openi_of_kaggle_with_quoted_fields_over_several_lines_is_read(tmp_path):
    write_table(
        tmp_path / "indiana_reports.csv",
        ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"],
        ["1", "", "", "", "", "", 'XXXX "clear" lungs, XXXX.\nNo XXXX, mass..', "1. No edema\n2. Scar ."],
        ["2", "", "", "", "", "", "XXXX.", ""],
        encoding="utf-8-sig",
    )
    write_table(tmp_path / "indiana_projections.csv", "uid,filename,projection", "1,a.png,Frontal", "2,b.png,Frontal")
    rows, problems = read("openi", tmp_path)
    assert {name: row["report"] for name, row in rows.items()} == {
        "a.png": '"clear" lungs. No mass. 1. No edema. 2. Scar.'
    }
    assert [reason for _, reason in problems] == [LEFT_OUT + "the report has no findings+impression"]
    with pytest.raises(ValueError, match="text is 'all', expected one of findings"):
        list(source_rows("openi", tmp_path, text="all"))


# ----------------------------------------------------------------------------------------------------- folder and DICOM


def dicom(path, pixels=None, **fields):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pixels = np.zeros((8, 8), np.uint16) if pixels is None else pixels
    file = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    file.SOPClassUID, (file.Rows, file.Columns) = meta.MediaStorageSOPClassUID, pixels.shape
    file.PhotometricInterpretation, file.SamplesPerPixel = "MONOCHROME2", 1
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.PixelData = pixels.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    return path


def test_folder_takes_patient_study_and_view_from_dicom_and_the_report_from_beside_it(tmp_path):
    dicom(tmp_path / "a/film.dcm", PatientID="P7", StudyInstanceUID="1.2.3", ViewPosition="AP")
    (tmp_path / "a/film.txt").write_text("INDICATION: Cough.\nFINDINGS: Clear.\nIMPRESSION: Normal.")
    dicom(tmp_path / "b/1.2.840.77", PatientID="P8", ViewPosition="LL")
    (tmp_path / "b/1.2.840.77.txt").write_bytes("Ödem rechts, 3 µm".encode("latin-1"))
    draw(tmp_path / "c.png", tmp_path / "d.png", tmp_path / "e.png")
    (tmp_path / "c.txt").write_text("No mass")
    draw(tmp_path / "g.png", tmp_path / "h.png")
    (tmp_path / "g.txt").write_text("Findings\nNo edema\n\nImpression\nMass\n\nSigned by: Dr. A. Bee")
    (tmp_path / "h.txt").write_text("Chest X-ray\n\nMass\nNo edema")
    (tmp_path / "e.txt").write_text(" ___ ")
    (tmp_path / "f.dcm").write_text("no DICOM")
    (tmp_path / "f.txt").write_text("Mass.")
    dicom(tmp_path / "DICOMDIR")
    (tmp_path / "notes").write_text("not an image")
    rows, problems = read("folder", tmp_path)
    check_rows(rows_to_dataset(rows.values()))
    assert {name: row["report"] for name, row in rows.items()} == {
        "a/film.dcm": "Clear. Normal.", "b/1.2.840.77": "Ödem rechts, 3 µm", "c.png": "No mass",
        "g.png": "No edema. Mass.", "h.png": "Chest X-ray. Mass. No edema",
    }  # fmt: skip
    assert [rows["a/film.dcm"][key] for key in ("patient_id", "study_id", "view")] == ["P7", "1.2.3", "AP"]
    assert (rows["b/1.2.840.77"]["view"], rows["c.png"]["view"]) == ("LATERAL", "")
    reasons = [reason for _, reason in problems]
    assert "no report d.png.txt" in reasons[0] and reasons[1] == "the report is empty"
    assert "not a readable DICOM file" in reasons[2]


def test_trap_10_monochrome1_is_inverted_after_the_window_is_applied(tmp_path):
    pixels = np.repeat([[0, 500, 1000, 1000]], 4, axis=0)
    path = dicom(
        tmp_path / "film.dcm", pixels, PhotometricInterpretation="MONOCHROME1", WindowCenter=250, WindowWidth=500
    )
    picture, size = load_shrunk(str(path), 4)
    # the window ends at 500; inverting first would make 500 white
    assert size == (4, 4) and np.asarray(picture)[0].tolist() == [255, 0, 0, 0]


# --------------------------------------------------------------------------------------------------------------- tables


def test_table_is_read_by_column_name_from_csv_gzip_and_zip(tmp_path):
    path = write_table(tmp_path / "t.csv", " b ,a,c", '" x, y",1,', "", "z,2,")
    plain = list(read_table(path, ["a", "b"], optional=["d"]))
    assert plain == [(f"{path}, line 2", {"a": "1", "b": "x, y"}), (f"{path}, line 4", {"a": "2", "b": "z"})]
    (tmp_path / "g.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    with zipfile.ZipFile(tmp_path / "z.csv.zip", "w") as archive:
        archive.write(path, "t.csv")
        archive.writestr("__MACOSX/._t.csv", "x")
    for name in ("g.csv", "z.csv"):
        packed = find_file(tmp_path, "other.csv", name)
        assert [record for _, record in read_table(packed, ["a", "b"])] == [record for _, record in plain]


def test_table_of_unknown_encoding_is_read(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "latin-1"):
        path = write_table(tmp_path / "t.csv", "a,b", "Ödem,1", "plain,2", encoding=encoding)
        assert [record["a"] for _, record in read_table(path, ["a"])] == ["Ödem", "plain"]
    assert decode_text("5 µm".encode("cp1252")) == "5 µm" and decode_text(b"\x81") == "\x81"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table is empty; expected the columns a, b"),
        (b"a,c\n1,2\n", "there is no column 'b'; the header has a, c"),
        (b"a,b, b\n1,2,3\n", "the column 'b' occurs 2 times"),
        (b"a,b\n1,2\n1\n", "line 3: 1 fields, but the header has 2"),
        (b"a,b\n1,2,\n", "line 2: 3 fields, but the header has 2"),
        (b'a,b\n1,"2\n3,4\n', "not a readable table: unexpected end of data"),
    ],
)
def test_damaged_table_is_an_error_that_names_the_file(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"t.csv.*{message}"):
        list(read_table(tmp_path / "t.csv", ["a", "b"]))


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv.zip"])
def test_packed_table_that_is_cut_off_or_no_archive_is_an_error(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(ValueError, match=f"{name}.*not a readable table"):
        list(read_table(path, ["a"]))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"a,b\n" + b"".join(b"%d,2\n" % n for n in range(9999)))[:-2000])
        with pytest.raises(ValueError, match="not a readable table"):
            list(read_table(path, ["a"]))


def test_labels_stated_in_several_ways_are_present_before_uncertain_before_absent():
    found = labels_of("row", raise_problem, ["Effusion", "effusion"], ["Effusion", "Mass", "pneumonia"], ["mass"])
    assert found == {"present": ["pleural effusion"], "absent": ["pneumonia"], "uncertain": ["mass"]}
    # covid-19 is a pneumonia, so that is not absent
    assert labels_of("row", raise_problem, ["covid-19"], ["pneumonia", "edema"])["absent"] == ["edema"]
    with pytest.raises(ValueError, match="row: 'no finding' is present together with .*'mass'"):
        labels_of("row", raise_problem, ["no finding", "mass"])


def test_hashed_share_is_even_and_fixed():
    shares = [hashed_share("set", str(number)) for number in range(2000)]
    assert 0 <= min(shares) and max(shares) < 1 and abs(np.mean(shares) - 0.5) < 0.03
    assert hashed_share("set", "1") == shares[1] != hashed_share("other", "1")
    assert hashed_share("ab", "c") != hashed_share("a", "bc")
