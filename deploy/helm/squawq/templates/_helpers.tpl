{{- define "squawq.name" -}}
{{- if contains "squawq" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-squawq{{ end }}
{{- end }}

{{- define "squawq.selector" -}}
app.kubernetes.io/name: squawq
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "squawq.labels" -}}
{{ include "squawq.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
