from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_CLASSIFY: _ClassVar[Task]
    TASK_DETECT: _ClassVar[Task]
    TASK_SEGMENT: _ClassVar[Task]
    TASK_TRANSLATE: _ClassVar[Task]

class ColorOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COLOR_ORDER_UNSPECIFIED: _ClassVar[ColorOrder]
    COLOR_ORDER_RGB: _ClassVar[ColorOrder]
    COLOR_ORDER_BGR: _ClassVar[ColorOrder]

class MaskEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MASK_ENCODING_UNSPECIFIED: _ClassVar[MaskEncoding]
    MASK_ENCODING_COCO_RLE: _ClassVar[MaskEncoding]
    MASK_ENCODING_POLYGON: _ClassVar[MaskEncoding]
    MASK_ENCODING_PNG: _ClassVar[MaskEncoding]

class ImageEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_ENCODING_UNSPECIFIED: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_PNG: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_JPEG: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_WEBP: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_RAW: _ClassVar[ImageEncoding]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_DRAINING: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
TASK_UNSPECIFIED: Task
TASK_CLASSIFY: Task
TASK_DETECT: Task
TASK_SEGMENT: Task
TASK_TRANSLATE: Task
COLOR_ORDER_UNSPECIFIED: ColorOrder
COLOR_ORDER_RGB: ColorOrder
COLOR_ORDER_BGR: ColorOrder
MASK_ENCODING_UNSPECIFIED: MaskEncoding
MASK_ENCODING_COCO_RLE: MaskEncoding
MASK_ENCODING_POLYGON: MaskEncoding
MASK_ENCODING_PNG: MaskEncoding
IMAGE_ENCODING_UNSPECIFIED: ImageEncoding
IMAGE_ENCODING_PNG: ImageEncoding
IMAGE_ENCODING_JPEG: ImageEncoding
IMAGE_ENCODING_WEBP: ImageEncoding
IMAGE_ENCODING_RAW: ImageEncoding
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_DRAINING: ModelState
MODEL_STATE_FAILED: ModelState

class Image(_message.Message):
    __slots__ = ("encoded", "raw")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    raw: RawImage
    def __init__(self, encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ...) -> None: ...

class RawImage(_message.Message):
    __slots__ = ("height", "width", "channels", "color_order", "data")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    COLOR_ORDER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    channels: int
    color_order: ColorOrder
    data: bytes
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ..., color_order: _Optional[_Union[ColorOrder, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ModelSelector(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ClassFilter(_message.Message):
    __slots__ = ("class_names", "class_ids")
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    class_names: _containers.RepeatedScalarFieldContainer[str]
    class_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, class_names: _Optional[_Iterable[str]] = ..., class_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_ms", "preprocess_ms", "queue_ms", "forward_ms", "postprocess_ms", "batch_size", "encode_ms")
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_MS_FIELD_NUMBER: _ClassVar[int]
    POSTPROCESS_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    decode_ms: float
    preprocess_ms: float
    queue_ms: float
    forward_ms: float
    postprocess_ms: float
    batch_size: int
    encode_ms: float
    def __init__(self, decode_ms: _Optional[float] = ..., preprocess_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., forward_ms: _Optional[float] = ..., postprocess_ms: _Optional[float] = ..., batch_size: _Optional[int] = ..., encode_ms: _Optional[float] = ...) -> None: ...

class ResponseInfo(_message.Message):
    __slots__ = ("model_name", "model_version", "image_height", "image_width", "timings")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    image_height: int
    image_width: int
    timings: Timings
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., image_height: _Optional[int] = ..., image_width: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("model", "image", "top_k", "score_threshold", "classes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    model: ModelSelector
    image: Image
    top_k: int
    score_threshold: float
    classes: ClassFilter
    def __init__(self, model: _Optional[_Union[ModelSelector, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., top_k: _Optional[int] = ..., score_threshold: _Optional[float] = ..., classes: _Optional[_Union[ClassFilter, _Mapping]] = ...) -> None: ...

class ScoredClass(_message.Message):
    __slots__ = ("class_id", "class_name", "score")
    CLASS_ID_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    class_id: int
    class_name: str
    score: float
    def __init__(self, class_id: _Optional[int] = ..., class_name: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("classes", "info")
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    classes: _containers.RepeatedCompositeFieldContainer[ScoredClass]
    info: ResponseInfo
    def __init__(self, classes: _Optional[_Iterable[_Union[ScoredClass, _Mapping]]] = ..., info: _Optional[_Union[ResponseInfo, _Mapping]] = ...) -> None: ...

class DetectRequest(_message.Message):
    __slots__ = ("model", "image", "score_threshold", "iou_threshold", "max_detections", "classes", "mask_encoding")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    IOU_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MAX_DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    MASK_ENCODING_FIELD_NUMBER: _ClassVar[int]
    model: ModelSelector
    image: Image
    score_threshold: float
    iou_threshold: float
    max_detections: int
    classes: ClassFilter
    mask_encoding: MaskEncoding
    def __init__(self, model: _Optional[_Union[ModelSelector, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., score_threshold: _Optional[float] = ..., iou_threshold: _Optional[float] = ..., max_detections: _Optional[int] = ..., classes: _Optional[_Union[ClassFilter, _Mapping]] = ..., mask_encoding: _Optional[_Union[MaskEncoding, str]] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("x1", "y1", "x2", "y2")
    X1_FIELD_NUMBER: _ClassVar[int]
    Y1_FIELD_NUMBER: _ClassVar[int]
    X2_FIELD_NUMBER: _ClassVar[int]
    Y2_FIELD_NUMBER: _ClassVar[int]
    x1: float
    y1: float
    x2: float
    y2: float
    def __init__(self, x1: _Optional[float] = ..., y1: _Optional[float] = ..., x2: _Optional[float] = ..., y2: _Optional[float] = ...) -> None: ...

class Detection(_message.Message):
    __slots__ = ("class_id", "class_name", "score", "box", "mask")
    CLASS_ID_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    class_id: int
    class_name: str
    score: float
    box: Box
    mask: Mask
    def __init__(self, class_id: _Optional[int] = ..., class_name: _Optional[str] = ..., score: _Optional[float] = ..., box: _Optional[_Union[Box, _Mapping]] = ..., mask: _Optional[_Union[Mask, _Mapping]] = ...) -> None: ...

class DetectResponse(_message.Message):
    __slots__ = ("detections", "info")
    DETECTIONS_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    detections: _containers.RepeatedCompositeFieldContainer[Detection]
    info: ResponseInfo
    def __init__(self, detections: _Optional[_Iterable[_Union[Detection, _Mapping]]] = ..., info: _Optional[_Union[ResponseInfo, _Mapping]] = ...) -> None: ...

class SegmentRequest(_message.Message):
    __slots__ = ("model", "image", "score_threshold", "classes", "mask_encoding")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    MASK_ENCODING_FIELD_NUMBER: _ClassVar[int]
    model: ModelSelector
    image: Image
    score_threshold: float
    classes: ClassFilter
    mask_encoding: MaskEncoding
    def __init__(self, model: _Optional[_Union[ModelSelector, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., score_threshold: _Optional[float] = ..., classes: _Optional[_Union[ClassFilter, _Mapping]] = ..., mask_encoding: _Optional[_Union[MaskEncoding, str]] = ...) -> None: ...

class Mask(_message.Message):
    __slots__ = ("coco_rle", "polygons", "png")
    COCO_RLE_FIELD_NUMBER: _ClassVar[int]
    POLYGONS_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    coco_rle: CocoRle
    polygons: Polygons
    png: bytes
    def __init__(self, coco_rle: _Optional[_Union[CocoRle, _Mapping]] = ..., polygons: _Optional[_Union[Polygons, _Mapping]] = ..., png: _Optional[bytes] = ...) -> None: ...

class CocoRle(_message.Message):
    __slots__ = ("height", "width", "counts")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    counts: bytes
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., counts: _Optional[bytes] = ...) -> None: ...

class Polygons(_message.Message):
    __slots__ = ("polygons",)
    POLYGONS_FIELD_NUMBER: _ClassVar[int]
    polygons: _containers.RepeatedCompositeFieldContainer[Polygon]
    def __init__(self, polygons: _Optional[_Iterable[_Union[Polygon, _Mapping]]] = ...) -> None: ...

class Polygon(_message.Message):
    __slots__ = ("xy",)
    XY_FIELD_NUMBER: _ClassVar[int]
    xy: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, xy: _Optional[_Iterable[float]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("class_id", "class_name", "area", "box", "mask")
    CLASS_ID_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    AREA_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    class_id: int
    class_name: str
    area: int
    box: Box
    mask: Mask
    def __init__(self, class_id: _Optional[int] = ..., class_name: _Optional[str] = ..., area: _Optional[int] = ..., box: _Optional[_Union[Box, _Mapping]] = ..., mask: _Optional[_Union[Mask, _Mapping]] = ...) -> None: ...

class SegmentResponse(_message.Message):
    __slots__ = ("segments", "info", "background_id")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_ID_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    info: ResponseInfo
    background_id: int
    def __init__(self, segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., info: _Optional[_Union[ResponseInfo, _Mapping]] = ..., background_id: _Optional[int] = ...) -> None: ...

class TranslateRequest(_message.Message):
    __slots__ = ("model", "image", "image_encoding", "quality")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ENCODING_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    model: ModelSelector
    image: Image
    image_encoding: ImageEncoding
    quality: int
    def __init__(self, model: _Optional[_Union[ModelSelector, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., image_encoding: _Optional[_Union[ImageEncoding, str]] = ..., quality: _Optional[int] = ...) -> None: ...

class TranslateResponse(_message.Message):
    __slots__ = ("image", "height", "width", "info")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    image: Image
    height: int
    width: int
    info: ResponseInfo
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., info: _Optional[_Union[ResponseInfo, _Mapping]] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[PredictItem]
    def __init__(self, items: _Optional[_Iterable[_Union[PredictItem, _Mapping]]] = ...) -> None: ...

class PredictItem(_message.Message):
    __slots__ = ("id", "classify", "detect", "segment", "translate", "cancel", "timeout_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLASSIFY_FIELD_NUMBER: _ClassVar[int]
    DETECT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    TRANSLATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    id: int
    classify: ClassifyRequest
    detect: DetectRequest
    segment: SegmentRequest
    translate: TranslateRequest
    cancel: bool
    timeout_ms: int
    def __init__(self, id: _Optional[int] = ..., classify: _Optional[_Union[ClassifyRequest, _Mapping]] = ..., detect: _Optional[_Union[DetectRequest, _Mapping]] = ..., segment: _Optional[_Union[SegmentRequest, _Mapping]] = ..., translate: _Optional[_Union[TranslateRequest, _Mapping]] = ..., cancel: bool = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[PredictAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[PredictAnswer, _Mapping]]] = ...) -> None: ...

class PredictAnswer(_message.Message):
    __slots__ = ("id", "request_id", "classify", "detect", "segment", "translate", "failure")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLASSIFY_FIELD_NUMBER: _ClassVar[int]
    DETECT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    TRANSLATE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    id: int
    request_id: str
    classify: ClassifyResponse
    detect: DetectResponse
    segment: SegmentResponse
    translate: TranslateResponse
    failure: PredictFailure
    def __init__(self, id: _Optional[int] = ..., request_id: _Optional[str] = ..., classify: _Optional[_Union[ClassifyResponse, _Mapping]] = ..., detect: _Optional[_Union[DetectResponse, _Mapping]] = ..., segment: _Optional[_Union[SegmentResponse, _Mapping]] = ..., translate: _Optional[_Union[TranslateResponse, _Mapping]] = ..., failure: _Optional[_Union[PredictFailure, _Mapping]] = ...) -> None: ...

class PredictFailure(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "task", "state", "state_reason", "is_default", "backend", "device", "runtime", "precision", "licence", "source", "class_names", "preprocess_json", "max_batch_size", "max_queued_jobs", "queued_jobs", "runtime_reason", "latency_curve", "max_delay_ms", "target_p99_ms", "answer_within_ms", "max_wait_ms", "latency_beside")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_JSON_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_JOBS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_JOBS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_REASON_FIELD_NUMBER: _ClassVar[int]
    LATENCY_CURVE_FIELD_NUMBER: _ClassVar[int]
    MAX_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    TARGET_P99_MS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BESIDE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    task: Task
    state: ModelState
    state_reason: str
    is_default: bool
    backend: str
    device: str
    runtime: str
    precision: str
    licence: str
    source: str
    class_names: _containers.RepeatedScalarFieldContainer[str]
    preprocess_json: str
    max_batch_size: int
    max_queued_jobs: int
    queued_jobs: int
    runtime_reason: str
    latency_curve: _containers.RepeatedCompositeFieldContainer[BatchLatency]
    max_delay_ms: float
    target_p99_ms: float
    answer_within_ms: float
    max_wait_ms: float
    latency_beside: _containers.RepeatedCompositeFieldContainer[BatchLatency]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., task: _Optional[_Union[Task, str]] = ..., state: _Optional[_Union[ModelState, str]] = ..., state_reason: _Optional[str] = ..., is_default: bool = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., runtime: _Optional[str] = ..., precision: _Optional[str] = ..., licence: _Optional[str] = ..., source: _Optional[str] = ..., class_names: _Optional[_Iterable[str]] = ..., preprocess_json: _Optional[str] = ..., max_batch_size: _Optional[int] = ..., max_queued_jobs: _Optional[int] = ..., queued_jobs: _Optional[int] = ..., runtime_reason: _Optional[str] = ..., latency_curve: _Optional[_Iterable[_Union[BatchLatency, _Mapping]]] = ..., max_delay_ms: _Optional[float] = ..., target_p99_ms: _Optional[float] = ..., answer_within_ms: _Optional[float] = ..., max_wait_ms: _Optional[float] = ..., latency_beside: _Optional[_Iterable[_Union[BatchLatency, _Mapping]]] = ...) -> None: ...

class BatchLatency(_message.Message):
    __slots__ = ("batch_size", "latency_ms")
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    batch_size: int
    latency_ms: float
    def __init__(self, batch_size: _Optional[int] = ..., latency_ms: _Optional[float] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: Task
    def __init__(self, task: _Optional[_Union[Task, str]] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...
