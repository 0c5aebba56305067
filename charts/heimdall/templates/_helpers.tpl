{{- define "heimdall.name" -}}
{{ .Values.nameOverride | default "heimdall" }}
{{- end }}

{{- define "heimdall.fullname" -}}
{{- $name := .Values.fullnameOverride }}
{{- if not $name }}
{{- $name = printf "%s-%s" .Release.Name (include "heimdall.name" .) }}
{{- if contains (include "heimdall.name" .) .Release.Name }}{{- $name = .Release.Name }}{{ end }}
{{- if gt (len $name) 39 }}{{- /* A StatefulSet's pods carry its name and 11 characters more in a label of 63. */}}
{{- fail (printf "the release's name %s is too long: what is made of it may have 39 characters, and %s has %d. Choose a shorter one, or set fullnameOverride" .Release.Name $name (len $name)) }}
{{- end }}
{{- if not (regexMatch "^[a-z][a-z0-9-]*$" $name) }}
{{- fail (printf "the release's name %s can't be used: names of Services begin with a letter, and have a-z, 0-9 and - alone. Choose another one, or set fullnameOverride" .Release.Name) }}
{{- end }}
{{- end }}
{{- $name }}
{{- end }}

{{- /* The beginning of a Job's name, which its pods carry in a label of 63 characters, with revision and checksum behind it. */}}
{{- define "heimdall.jobname" -}}
{{ include "heimdall.fullname" . | trunc 32 | trimSuffix "-" }}
{{- end }}

{{- /* Labels of a role: include "heimdall.labels" (dict "root" $ "role" "operator") */}}
{{- define "heimdall.labels" -}}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "heimdall.selector" . }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Labels and annotations of a role's pods: include "heimdall.podMetadata" (dict "root" $ "role" "operator" "values"
.Values.operator). With "annotations", the chart's own. */}}
{{- define "heimdall.podMetadata" -}}
labels:
  {{- include "heimdall.selector" . | nindent 2 }}
  {{- with merge (dict) .values.podLabels .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "heimdall.selector" -}}
app.kubernetes.io/name: {{ include "heimdall.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- /* Of an image its digest, if it has one: a tag may come to mean another image. include "heimdall.image" .Values.operator.image */}}
{{- define "heimdall.image" -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end }}
{{- end }}

{{- /* Whether the chart's own MLflow asks who somebody is: "true" or nothing. */}}
{{- define "heimdall.hasAuth" -}}
{{- if and .Values.tracking.auth.enabled (not .Values.tracking.external) }}true{{ end }}
{{- end }}

{{- define "heimdall.trackingSecret" -}}
{{- if and (include "heimdall.hasAuth" .) (not .Values.trainer.createSecrets) (not .Values.tracking.auth.existingSecret) }}
{{- fail (printf "tracking.auth.existingSecret is needed with trainer.createSecrets=false: MLflow's passwords would be made up, and the Secret %s, which is yours then, must hold one of them. Name a Secret with the keys admin-password, operator-password, trainer-password and flask-secret-key (one that the chart made before is named %s-tracking), or set tracking.auth.enabled=false" .Values.trainer.secretName (include "heimdall.fullname" .)) }}
{{- end }}
{{- .Values.tracking.auth.existingSecret | default (printf "%s-tracking" (include "heimdall.fullname" .)) }}
{{- end }}

{{- define "heimdall.databaseSecret" -}}
{{- if not (or .Values.trainer.createSecrets .Values.database.existingSecret) }}
{{- fail (printf "database.existingSecret is needed with trainer.createSecrets=false: passwords would be made up anew at each rendering, and the Secret %s, which is yours then, must hold one of them. Name a Secret with the keys postgres-password, mlflow-password, writer-password and reader-password (one that the chart made before is named %s-database)" .Values.trainer.secretName (include "heimdall.fullname" .)) }}
{{- end }}
{{- if and .Values.database.external (not .Values.database.existingSecret) }}{{ fail "database.existingSecret is needed with database.external: the passwords are that server's" }}{{ end }}
{{- .Values.database.existingSecret | default (printf "%s-database" (include "heimdall.fullname" .)) }}
{{- end }}

{{- define "heimdall.objectStoreSecret" -}}
{{- if not (or .Values.trainer.createSecrets .Values.objectStore.existingSecret) }}
{{- fail (printf "objectStore.existingSecret is needed with trainer.createSecrets=false: keys would be made up anew at each rendering, and the Secret %s, which is yours then, must hold one of them. Name a Secret with the keys root-user, root-password, and mlflow-, writer- and reader-access-key and -secret-key (one that the chart made before is named %s-object-store)" .Values.trainer.secretName (include "heimdall.fullname" .)) }}
{{- end }}
{{- if and .Values.objectStore.external (not .Values.objectStore.existingSecret) }}{{ fail "objectStore.existingSecret is needed with objectStore.external: the keys are that server's" }}{{ end }}
{{- .Values.objectStore.existingSecret | default (printf "%s-object-store" (include "heimdall.fullname" .)) }}
{{- end }}

{{- define "heimdall.sslMode" -}}
{{- if and (hasPrefix "verify-" .Values.database.sslMode) (not (include "heimdall.caSource" .)) }}
{{- fail (printf "caBundle is needed with database.sslMode=%s: PostgreSQL's clients know no public authorities. Give the certificates of the authority that signed the server's, which whoever runs it publishes, or set database.sslMode=require" .Values.database.sslMode) }}
{{- end }}
{{- .Values.database.sslMode }}
{{- end }}

{{- /* As URLs have it: an IPv6 address in brackets. */}}
{{- define "heimdall.databaseHost" -}}
{{- if .Values.database.external }}
{{- $host := required "database.externalHost is needed with database.external" .Values.database.externalHost }}
{{- if contains ":" $host }}[{{ $host }}]{{ else }}{{ $host }}{{ end }}
{{- else }}{{ include "heimdall.fullname" . }}-database.{{ .Release.Namespace }}.svc{{ end }}
{{- end }}

{{- define "heimdall.objectStoreUrl" -}}
{{- if .Values.objectStore.external }}{{ required "objectStore.externalUrl is needed with objectStore.external" .Values.objectStore.externalUrl }}
{{- else }}http://{{ include "heimdall.fullname" . }}-object-store.{{ .Release.Namespace }}.svc:9000{{ end }}
{{- end }}

{{- define "heimdall.trackingUrl" -}}
{{- if .Values.tracking.external }}{{ required "tracking.externalUrl is needed with tracking.external" .Values.tracking.externalUrl }}
{{- else }}http://{{ include "heimdall.fullname" . }}-tracking.{{ .Release.Namespace }}.svc:5000{{ end }}
{{- end }}

{{- /* The data of a Secret whose values are generated once: what the cluster has wins, and of a Secret that is not ours nothing is
made up. Computed once a rendering, because other Secrets are made of the same values. include "heimdall.secretData" (dict
"root" $ "name" NAME "existing" BOOL "generated" DICT) gives JSON of base64 values. */}}
{{- define "heimdall.secretData" -}}
{{- $memo := get .root.Values "memo" | default dict }}
{{- if not (hasKey $memo .name) }}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .name }}
{{- $kept := dict }}
{{- if $found }}{{- $kept = $found.data | default dict }}{{- end }}
{{- if and .existing (not $found) }}
{{- fail (printf "Secret %s is not in namespace %s, or this is rendered without a cluster: make it first, or set trainer.createSecrets=false and make the Secrets of trainer yourself (docs/chart.md)" .name .root.Release.Namespace) }}
{{- end }}
{{- $data := dict }}
{{- range $key, $value := .generated }}
{{- $_ := set $data $key (get $kept $key | default ($value | b64enc)) }}
{{- end }}
{{- $_ := set $memo .name (merge (dict) $kept $data) }}
{{- $_ := set .root.Values "memo" $memo }}
{{- end }}
{{- get $memo .name | toJson }}
{{- end }}

{{- /* Refuses a Secret that is there and lacks a key: pods would wait for it, or have no login. One that can't be looked up is not
judged. include "heimdall.hasKeys" (dict "root" $ "name" NAME "keys" KEYS) gives nothing. */}}
{{- define "heimdall.hasKeys" -}}
{{- $name := .name }}
{{- with lookup "v1" "Secret" .root.Release.Namespace .name }}
{{- $data := .data | default dict }}
{{- range $.keys }}
{{- if not (get $data .) }}{{ fail (printf "Secret %s has no key %s, or nothing in it" $name .) }}{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "heimdall.databaseData" -}}
{{- $generated := dict }}
{{- range list "postgres-password" "mlflow-password" "writer-password" "reader-password" }}
{{- $_ := set $generated . (randAlphaNum 32) }}
{{- end }}
{{- include "heimdall.secretData" (dict "root" . "name" (include "heimdall.databaseSecret" .) "existing" .Values.database.existingSecret "generated" $generated) }}
{{- end }}

{{- define "heimdall.objectStoreData" -}}
{{- $generated := dict "root-user" "heimdall-root" "root-password" (randAlphaNum 32) }}
{{- range list "mlflow" "writer" "reader" }}
{{- $_ := set $generated (printf "%s-access-key" .) (printf "heimdall-%s" .) }}
{{- $_ := set $generated (printf "%s-secret-key" .) (randAlphaNum 32) }}
{{- end }}
{{- include "heimdall.secretData" (dict "root" . "name" (include "heimdall.objectStoreSecret" .) "existing" .Values.objectStore.existingSecret "generated" $generated) }}
{{- end }}

{{- define "heimdall.trackingData" -}}
{{- $generated := dict }}
{{- range list "admin-password" "operator-password" "trainer-password" "flask-secret-key" }}
{{- $_ := set $generated . (randAlphaNum 32) }}
{{- end }}
{{- include "heimdall.secretData" (dict "root" . "name" (include "heimdall.trackingSecret" .) "existing" .Values.tracking.auth.existingSecret "generated" $generated) }}
{{- end }}

{{- /* What reads or writes recordings: include "heimdall.recordingsAccess" (dict "root" $ "who" "reader") */}}
{{- define "heimdall.recordingsAccess" -}}
{{- $root := .root }}
{{- $database := include "heimdall.databaseData" $root | fromJson }}
{{- $store := include "heimdall.objectStoreData" $root | fromJson }}
HEIMDALL_DATABASE_URL: {{ printf "postgresql://heimdall_%s@%s:%v/heimdall" .who (include "heimdall.databaseHost" $root) $root.Values.database.port | b64enc }}
PGPASSWORD: {{ get $database (printf "%s-password" .who) }}
HEIMDALL_RECORDINGS_URL: {{ printf "s3://%s" $root.Values.objectStore.recordingsBucket | b64enc }}
HEIMDALL_S3_ENDPOINT_URL: {{ include "heimdall.objectStoreUrl" $root | b64enc }}
HEIMDALL_S3_REGION: {{ $root.Values.objectStore.region | b64enc }}
{{- if $root.Values.database.external }}
PGSSLMODE: {{ include "heimdall.sslMode" $root | b64enc }}
{{- end }}
{{- /* Training pods are told by the operator, which mounts the file; of what adds recordings nobody else knows. */}}
{{- if and (eq .who "writer") (include "heimdall.caSource" $root) }}
{{- if $root.Values.database.external }}
PGSSLROOTCERT: {{ "/etc/heimdall-ca/ca.crt" | b64enc }}
{{- end }}
{{- if and $root.Values.objectStore.external (hasPrefix "https:" $root.Values.objectStore.externalUrl) }}
HEIMDALL_S3_CA_BUNDLE: {{ "/etc/heimdall-ca/ca.crt" | b64enc }}
{{- end }}
{{- end }}
HEIMDALL_S3_ACCESS_KEY: {{ get $store (printf "%s-access-key" .who) }}
HEIMDALL_S3_SECRET_KEY: {{ get $store (printf "%s-secret-key" .who) }}
{{- end }}

{{- define "heimdall.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "heimdall.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}

{{- /* How MLflow's client introduces itself as the operator, as items of env. */}}
{{- define "heimdall.trackingLogin" -}}
{{- if include "heimdall.hasAuth" . }}
- {name: MLFLOW_TRACKING_USERNAME, value: heimdall-operator}
- {name: MLFLOW_TRACKING_PASSWORD, valueFrom: {secretKeyRef: {name: {{ include "heimdall.trackingSecret" . }}, key: operator-password}}}
{{- end }}
{{- include "heimdall.trackingCA" . }}
{{- end }}

{{- define "heimdall.trackingCA" -}}
{{- if include "heimdall.caSource" . }}
- {name: MLFLOW_TRACKING_SERVER_CERT_PATH, value: /etc/heimdall-ca/ca.crt}
{{- end }}
{{- end }}

{{- /* The credentials of an external MLflow server, if it asks for them. */}}
{{- define "heimdall.externalTrackingLogin" -}}
{{- if and .Values.tracking.external .Values.tracking.existingSecret }}
envFrom: [{secretRef: {name: {{ .Values.tracking.existingSecret }}}}]
{{- end }}
{{- end }}

{{- /* Where the certificate authorities of private servers lie, as JSON {"kind", "name", "key"}; nothing where there are none. */}}
{{- define "heimdall.caSource" -}}
{{- $ca := .Values.caBundle }}
{{- $given := list }}
{{- range $name := list "certificates" "existingConfigMap" "existingSecret" }}
{{- if get $ca $name }}{{- $given = append $given (printf "caBundle.%s" $name) }}{{ end }}
{{- end }}
{{- if gt (len $given) 1 }}{{ fail (printf "%s are set: set one of them" (join " and " $given)) }}{{ end }}
{{- if $ca.certificates }}{{ dict "kind" "configMap" "name" (printf "%s-ca" (include "heimdall.fullname" .)) "key" "ca.crt" | toJson }}
{{- else if $ca.existingConfigMap }}{{ dict "kind" "configMap" "name" $ca.existingConfigMap "key" $ca.key | toJson }}
{{- else if $ca.existingSecret }}{{ dict "kind" "secret" "name" $ca.existingSecret "key" $ca.key | toJson }}
{{- end }}
{{- end }}

{{- define "heimdall.caVolume" -}}
{{- with include "heimdall.caSource" . }}
{{- $source := fromJson . }}
- name: ca
  {{ $source.kind }}:
    {{ if eq $source.kind "secret" }}secretName{{ else }}name{{ end }}: {{ $source.name }}
    items: [{key: {{ $source.key }}, path: ca.crt}]
{{- end }}
{{- end }}

{{- define "heimdall.caMount" -}}
{{- if include "heimdall.caSource" . }}
- {name: ca, mountPath: /etc/heimdall-ca, readOnly: true}
{{- end }}
{{- end }}

{{- /* Namespaces that the chart knows to have training pods, as JSON. */}}
{{- define "heimdall.trainingNamespaces" -}}
{{- prepend (concat .Values.trainer.namespaces .Values.operator.namespaces) .Release.Namespace | uniq | toJson }}
{{- end }}

{{- /* What is the same in every pod: include "heimdall.podDefaults" (dict "root" $ "values" .Values.operator) */}}
{{- define "heimdall.podDefaults" -}}
# Variables for every Service of the namespace would be taken for settings: HEIMDALL_… are ours.
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- /* What training pods are told of MLflow beside its address, as data of a Secret. */}}
{{- define "heimdall.trainerTracking" -}}
MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD: {{ .Values.tracking.presignedTransfers | toString | b64enc }}
MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD: {{ .Values.tracking.presignedTransfers | toString | b64enc }}
{{- /* 64 MiB: by default, which is 500 MiB, most checkpoints would go through the server. */}}
MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE: {{ "67108864" | b64enc }}
{{- /* 16 MiB: several chunks of the default 100 MiB are held in memory at once, and that ends small pods. */}}
MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE: {{ "16777216" | b64enc }}
{{- if include "heimdall.hasAuth" . }}
MLFLOW_TRACKING_USERNAME: {{ "heimdall-trainer" | b64enc }}
MLFLOW_TRACKING_PASSWORD: {{ get (include "heimdall.trackingData" . | fromJson) "trainer-password" }}
{{- end }}
{{- if and .Values.tracking.external .Values.tracking.existingSecret }}
{{- $name := .Values.tracking.existingSecret }}
{{- $found := lookup "v1" "Secret" .Release.Namespace $name }}
{{- if not $found }}{{ fail (printf "Secret %s is not in namespace %s: make it first, or set trainer.createSecrets=false" $name .Release.Namespace) }}{{ end }}
{{- range $key := list "MLFLOW_TRACKING_USERNAME" "MLFLOW_TRACKING_PASSWORD" }}
{{ $key }}: {{ get $found.data $key }}
{{- end }}
{{- end }}
{{- end }}
