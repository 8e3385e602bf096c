"""Texts for comparing tokenizers: five kinds, with the names of the report's table, and one story in many languages."""

NEWS = """\
(Harrow Point, March 14) The Harrow Point Harbour Board today opened the rebuilt north breakwater, \
eleven months after two winter storms tore a gap of 140 feet into the old stone wall. The $38.6 million \
project protects about 420 fishing boats, the ferry dock and the fish market, which together support one \
in every five jobs in the county.

"When the wall failed, our crews could not leave port for nineteen days," said Marta Ellingsen, who has \
run the board since 2019. "People here do not want sympathy. They want to know that the next storm will \
find us ready."

The new structure stands nearly four feet higher than the one it replaces and rests on 9,200 \
interlocking concrete blocks. Engineers first considered repairing the old wall, but a survey carried \
out by divers last May showed that currents had washed away most of the gravel below it. A computer \
model then compared six designs; the one that was chosen lets part of each wave pass through, so that \
less sand gathers at the harbour mouth.

Not everyone is pleased. Owners of three beach hotels south of the town fear that the longer wall will \
change the way sand travels along the coast. The board has agreed to measure the beach twice a year \
until 2035 and to publish the results within thirty days of each survey.

The work was paid for by a state resilience grant (60 percent), a low-interest loan (25 percent) and \
harbour fees. Fees will rise by 4 percent in July, the first increase in seven years. Ferry service to \
Gull Island, which was cut to two sailings a day during construction, returns to its summer timetable on \
April 1. Visitors may walk along the top of the wall for the first time this weekend, weather \
permitting, between 9 a.m. and 6 p.m.
"""

KOREAN = """\
우리 동네 소식지는 2012년 봄, 작은 도서관의 책상 하나에서 시작되었습니다. 처음에는 주민 다섯 명이 한 \
달에 한 번 종이 한 장을 손으로 접어 나누어 주었지만, 지금은 매주 금요일 아침 약 8,400명의 독자에게 \
기사를 보내고 있습니다.

저희는 큰 신문이 다루지 않는 이야기를 씁니다. 새로 생긴 빵집, 시장의 오래된 수선 가게, 학교 앞 \
횡단보도의 신호 시간, 그리고 강가에 돌아온 새들까지 모두 소중한 소식입니다. 기사는 두 사람 이상이 사실을 \
확인한 뒤에 싣고, 잘못이 있으면 같은 자리에 바로잡은 내용을 알립니다. 광고를 받는 글에는 반드시 그 \
사실을 밝힙니다.

누구나 글과 사진을 보낼 수 있습니다. 편집실은 중앙로 27번지 2층이며 평일 오전 10시부터 오후 5시까지 열려 \
있습니다.
"""

CODE = '''\
class PriorityMap:
    """A dictionary that hands out its smallest value first (a binary heap with an index)."""

    def __init__(self, items=()):
        self.heap = []        # [(value, key), ...]
        self.position = {}    # key -> index in the heap
        for key, value in items:
            self.push(key, value)

    def __len__(self):
        return len(self.heap)

    def push(self, key, value):
        i = self.position.get(key)
        if i is None:
            i = len(self.heap)
            self.heap.append((value, key))
            self.position[key] = i
        elif value >= self.heap[i][0]:
            return  # only a smaller value moves an entry
        else:
            self.heap[i] = (value, key)
        while i > 0 and self.heap[i] < self.heap[(i - 1) // 2]:
            self._swap(i, (i - 1) // 2)
            i = (i - 1) // 2

    def pop(self):
        if not self.heap:
            raise IndexError("pop from an empty PriorityMap")
        self._swap(0, len(self.heap) - 1)
        value, key = self.heap.pop()
        del self.position[key]
        i = 0
        while (child := 2 * i + 1) < len(self.heap):
            if child + 1 < len(self.heap) and self.heap[child + 1] < self.heap[child]:
                child += 1
            if self.heap[i] <= self.heap[child]:
                break
            self._swap(i, child)
            i = child
        return key, value
'''

MATH = r"""\documentclass[11pt]{article}
\usepackage{amsmath,amssymb,amsthm}
\newtheorem{theorem}{Theorem}
\begin{document}

\begin{theorem}
For every integer $n \ge 1$,
\[
  \sum_{k=1}^{n} k\,(k+1) = \frac{n(n+1)(n+2)}{3}.
\]
\end{theorem}

\begin{proof}[First proof, by induction]
For $n = 1$ both sides equal $2$. Suppose the identity holds for some $n \ge 1$. Then
\begin{align*}
  \sum_{k=1}^{n+1} k(k+1)
    &= \frac{n(n+1)(n+2)}{3} + (n+1)(n+2) \\
    &= (n+1)(n+2)\left(\frac{n}{3} + 1\right) \\
    &= \frac{(n+1)(n+2)(n+3)}{3},
\end{align*}
which is the claim for $n+1$.
\end{proof}

\begin{proof}[Second proof, by telescoping]
Put $f(k) = \tfrac{1}{3}\,k(k+1)(k+2)$. Then
\[
  f(k) - f(k-1) = \frac{k(k+1)}{3}\bigl[(k+2) - (k-1)\bigr] = k(k+1),
\]
so that $\sum_{k=1}^{n} k(k+1) = f(n) - f(0) = f(n)$, because $f(0) = 0$.
\end{proof}

\begin{proof}[Third proof, by counting]
Divide by two: the claim reads $\sum_{k=1}^{n} \binom{k+1}{2} = \binom{n+2}{3}$. The right side counts the
$3$-element subsets of $\{0, 1, \dots, n+1\}$. Sort them by their largest element $m = k+1$, where
$1 \le k \le n$; the other two elements are chosen freely from the $k+1$ numbers below $m$, in
$\binom{k+1}{2}$ ways. \qedhere
\end{proof}

\noindent\textbf{Remark.} Subtracting $\sum_{k=1}^{n} k = \frac{n(n+1)}{2}$ gives
\[
  \sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}.
\]

\end{document}
"""

SCIENCE = """\
When carbon dioxide from the air dissolves in sea water it does not simply remain there as a gas: it \
reacts with water to form carbonic acid (CO₂ + H₂O ⇌ H₂CO₃), which quickly gives up one proton to become \
bicarbonate (HCO₃⁻) and, less readily, a second one to become carbonate (CO₃²⁻). At the usual pH of \
about 8.1 roughly nine tenths of the dissolved inorganic carbon is bicarbonate, a tenth is carbonate and \
less than one percent is dissolved gas, and because these forms exchange protons with one another the \
ocean resists sudden changes in acidity far better than pure water would. Corals, molluscs and many \
plankton build their shells from calcium carbonate (Ca²⁺ + CO₃²⁻ → CaCO₃), so a falling carbonate \
concentration makes building harder even where the water is still far from acidic. Below a depth of some \
4,000 m, cold and pressure of about 4 × 10⁷ Pa raise the solubility of the mineral until sinking shells \
dissolve as fast as they arrive, which is why the deepest sea floor is covered by red clay rather than \
by white chalky mud.
"""

TEXTS = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}

# The same few sentences, so that bytes per token can be set side by side.
LANGUAGES = {
    "english": """\
Every morning the baker opens his shop before the sun comes up. The first customers are the bus drivers, who buy \
warm bread and talk about the weather. On Sundays he also bakes a cake with apples from his garden.
""",
    "german": """\
Jeden Morgen öffnet der Bäcker seinen Laden, bevor die Sonne aufgeht. Die ersten Kunden sind die Busfahrer, die \
warmes Brot kaufen und über das Wetter reden. Sonntags backt er auch einen Kuchen mit Äpfeln aus seinem Garten.
""",
    "french": """\
Chaque matin, le boulanger ouvre sa boutique avant le lever du soleil. Les premiers clients sont les chauffeurs \
d'autobus, qui achètent du pain chaud et parlent du temps qu'il fait. Le dimanche, il prépare aussi un gâteau aux \
pommes de son jardin.
""",
    "spanish": """\
Cada mañana el panadero abre su tienda antes de que salga el sol. Los primeros clientes son los conductores de \
autobús, que compran pan caliente y hablan del tiempo. Los domingos hace también una tarta con manzanas de su jardín.
""",
    "turkish": """\
Fırıncı her sabah güneş doğmadan önce dükkânını açar. İlk müşteriler, sıcak ekmek alıp havadan konuşan otobüs \
şoförleridir. Pazar günleri bahçesindeki elmalarla bir kek de yapar.
""",
    "russian": """\
Каждое утро пекарь открывает свою лавку до восхода солнца. Первые покупатели — водители автобусов, они берут тёплый \
хлеб и говорят о погоде. По воскресеньям он печёт ещё и пирог с яблоками из своего сада.
""",
    "greek": """\
Κάθε πρωί ο φούρναρης ανοίγει το μαγαζί του πριν βγει ο ήλιος. Οι πρώτοι πελάτες είναι οι οδηγοί των λεωφορείων, που \
αγοράζουν ζεστό ψωμί και μιλούν για τον καιρό. Τις Κυριακές φτιάχνει και ένα κέικ με μήλα από τον κήπο του.
""",
    "arabic": """\
يفتح الخباز دكانه كل صباح قبل شروق الشمس. أول الزبائن هم سائقو الحافلات، يشترون الخبز الساخن ويتحدثون عن الطقس. \
وفي أيام الأحد يخبز أيضا كعكة بالتفاح من حديقته.
""",
    "hindi": """\
हर सुबह बेकर सूरज निकलने से पहले अपनी दुकान खोलता है। पहले ग्राहक बस चालक होते हैं, जो गरम रोटी खरीदते हैं और मौसम की \
बातें करते हैं। रविवार को वह अपने बगीचे के सेबों से केक भी बनाता है।
""",
    "chinese": """\
每天早上，面包师在太阳升起之前就打开店门。最早的客人是公交车司机，他们买热面包，聊聊天气。到了星期天，他还会用自家园子里的苹果烤一个蛋糕。
""",
    "japanese": """\
毎朝、パン屋さんは日が昇る前に店を開けます。最初のお客さんはバスの運転手たちで、温かいパンを買って天気の話をします。日曜日には、庭のりんごでケーキも焼きます。
""",
    "thai": """\
ทุกเช้าคนทำขนมปังเปิดร้านก่อนพระอาทิตย์ขึ้น ลูกค้ากลุ่มแรกคือคนขับรถเมล์ ซึ่งซื้อขนมปังร้อน ๆ \
และคุยกันเรื่องอากาศ ทุกวันอาทิตย์เขายังอบเค้กแอปเปิ้ลจากสวนของเขาด้วย
""",
}
