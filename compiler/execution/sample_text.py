"""A little text of many kinds, for checks when the user gave none: random token ids are no text, and models answer with noise."""

from __future__ import annotations

__all__ = ["SAMPLE_TEXT"]

SAMPLE_TEXT = (
    (
        "The lighthouse keeper wrote down the weather every evening, whether anything had happened or not. After thirty "
        "years the notebooks filled a cupboard, and the harbour office asked to borrow them, because nobody else had "
        "measured the wind on that coast for so long. He agreed on one condition: they were to be returned before "
        "winter, when he liked to read them again."
    ),
    (
        "To install the pump, first close the main valve and let the remaining water run out. Remove the four screws, "
        "lift the cover, and check that the seal is clean. If the motor hums but does not turn, the shaft is blocked; "
        "switch off the power before you free it. The warranty covers parts for twenty-four months and labour for twelve."
    ),
    (
        'def moving_average(values, width):\n    """Mean of every window of `width` neighbouring values."""\n    '
        'if width < 1:\n        raise ValueError(f"width must be positive, got {width}")\n    total = '
        "sum(values[:width])\n    result = [total / width]\n    for old, new in zip(values, values[width:]):\n        "
        "total += new - old\n        result.append(total / width)\n    return result\n"
    ),
    (
        '{"order": 48213, "items": [{"name": "paper A4", "count": 5, "price": 3.49}, {"name": "ink, '
        'black", "count": 2, "price": 18.90}], "paid": true, "sent": "2024-03-11T09:26:00Z", "note": null}\n'
        "12 * 7 = 84; 3.14159 * 2**2 = 12.56636; 17 % 5 = 2"
    ),
    (
        "Der Zug nach Leipzig hatte zwanzig Minuten Verspätung, und auf dem Bahnsteig wurde es kalt. Eine ältere Frau "
        "verteilte Äpfel aus ihrem Korb an die Kinder. Als der Zug endlich einfuhr, kannten sich alle beim Namen, und "
        "niemand hatte es mehr eilig."
    ),
    (
        "Le marché ouvre à six heures, bien avant l'arrivée des touristes. Les boulangers, les pêcheurs et les "
        "fleuristes installent leurs étals en silence. Vers midi, tout est vendu ; on replie les tables, on balaie la "
        "place, et la ville reprend son rythme."
    ),
    (
        "W małej bibliotece na rogu ulicy pracowała kobieta, która pamiętała każdą wypożyczoną książkę. Kiedy zamknięto "
        "budynek z powodu remontu, mieszkańcy przynosili jej zwroty do domu, a ona wszystko zapisywała w zeszycie w "
        "kratkę."
    ),
    (
        "El río baja crecido en primavera y los vecinos refuerzan la orilla con piedras. Según el ingeniero, el puente "
        "aguantará otros cincuenta años si se pinta cada cinco. La escuela organizó una visita para explicar cómo se "
        "mide el caudal del agua."
    ),
    (
        "Утром в деревне пахло дымом и свежим хлебом. Учитель собрал детей у старого моста и рассказал, как его строили "
        "без единого гвоздя. Потом они считали брёвна, спорили, кто насчитал верно, и записали ответ мелом на доске."
    ),
    (
        "春天的早晨，老人推着自行车去河边钓鱼。他说水位比去年高了两米，鱼却少了。孩子们围过来问他为什么，他笑着说：等到秋"
        "天你们就知道了。"
    ),
    (
        "駅前の小さな喫茶店では、毎朝同じ時間に同じ人たちが集まる。店主は注文を聞かずにコーヒーを出し、天気の話をする。雨"
        "の日には傘を貸してくれる。"
    ),
    (
        "في السوق القديم يبيع الحرفيون الأواني النحاسية والسجاد المنسوج يدويا. يقول أحدهم إن جده علمه الصنعة قبل أربعين "
        "عاما، وإن الزبائن يأتون اليوم من مدن بعيدة."
    ),
    (
        "गाँव के स्कूल में बच्चे हर सुबह पेड़ के नीचे पढ़ते हैं। शिक्षक ने उन्हें बताया कि बारिश का पानी कैसे इकट्ठा "
        "किया जाता है, और सबने मिलकर एक छोटा तालाब बनाया।"
    ),
)
